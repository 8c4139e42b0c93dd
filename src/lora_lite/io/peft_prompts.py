"""PEFT's prompts and prefixes, both ways: what stands before the text belongs to no layer of the file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import FileError, StateError, listing, shown
from ..core.registry import get_variant
from ..runtime.layers.attention import Attention
from ..runtime.model.record import Record, Target
from ..runtime.plan import plan
from .adapted import Adapted, uniform

Said = dict[str, Any]
Tensors = dict[str, Tensor]
Values = dict[str, Tensors]
KEYS = ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")
"""Tensors of the whole model."""
MAX_TOKENS = 1 << 16


@dataclass(frozen=True)
class Prompt:
    """One `peft_type`: the method here, its fields, and its tensors."""

    variant: str
    fields: Callable[[Said, Tensors], Said]
    values: Callable[[nn.Module, Said, Tensors, list[Target]], Values]
    same: bool = True
    """The method is the one PEFT trains; otherwise only the function is the same."""


def read_prompt(model: nn.Module, config: Said, tensors: Tensors, name: str) -> tuple[Record, Values, bool]:
    """The record, the tensors of its targets, and whether it is what PEFT trains.

    Raises:
        FileError: a tensor is missing or left over, or the prompt does not fit the model.
    """
    row, tensors = PROMPTS[config["peft_type"]], {k: _float(k, t) for k, t in tensors.items()}
    if config.get("num_transformer_submodules") not in (None, 1):
        raise FileError("the prompt stands before an encoder and a decoder, which is not read.")
    cfg = get_variant(row.variant).config(variant=row.variant, **row.fields(config, tensors))
    targets = plan(model, cfg).targets
    values = row.values(model, config, tensors, targets)
    if tensors:
        raise FileError(f"the file holds more than {config['peft_type']} has: {listing(sorted(tensors))}.")
    return Record(name, get_variant(cfg.variant), cfg, {t.path: t for t in targets}), values, row.same


def _float(key: str, t: Tensor) -> Tensor:
    if not t.is_floating_point():
        raise FileError(f"{key} holds {t.dtype}, expected floating numbers.")
    return t.detach().cpu().float()


def _rows(config: Said, tensors: Tensors) -> Said:
    t = tensors.get("prompt_embeddings")
    if t is None or t.dim() != 2 or not 0 < len(t) <= MAX_TOKENS:
        raise FileError("the file holds no prompt_embeddings, one row for each virtual token.")
    return {"r": len(t)}


def _cpt(config: Said, tensors: Tensors) -> Said:
    found = _rows(config, tensors)
    for ours, theirs in {"start_tokens": "cpt_token_ids", "token_types": "cpt_tokens_type_mask"}.items():
        found[ours] = tuple(config.get(theirs) or ())
    return found | {
        "epsilon": config.get("opt_projection_epsilon", 0.1),
        "format_epsilon": config.get("opt_projection_format_epsilon", 0.1),
    }


def _tasks(config: Said, tensors: Tensors) -> Said:
    return _rows(config, tensors) | {"tasks": config.get("num_tasks"), "ranks": config.get("num_ranks")}


def _frozen(config: Said, tensors: Tensors) -> Said:
    return _rows(config, tensors) | {"frozen": config.get("num_frozen_tokens", 1)}


def _attentions(config: Said, tensors: Tensors) -> Said:
    paths = {key.rpartition(".")[0] for key in tensors}
    prompt = next((t for key, t in tensors.items() if key.endswith(".adaption_prompt")), None)
    if prompt is None:
        raise FileError("the file holds no adaption_prompt.")
    return {"r": prompt.shape[-2], "target_names": tuple(re.escape(path) for path in sorted(paths))}


def _prompt(model: nn.Module, config: Said, tensors: Tensors, targets: list[Target]) -> Values:
    return {targets[0].path: {"lora_P": tensors.pop("prompt_embeddings")}}


def _moved(model: nn.Module, config: Said, tensors: Tensors, targets: list[Target]) -> Values:
    """The context's own embeddings, and how far they are moved."""
    P, ids = tensors.pop("prompt_embeddings"), config.get("cpt_token_ids") or []
    table = model.get_input_embeddings().weight.detach().float().cpu()  # type: ignore[operator, union-attr]
    if len(ids) != len(P) or not all(type(i) is int and 0 <= i < len(table) for i in ids):
        raise FileError(f"cpt_token_ids must be {len(P)} ids of the model's {len(table)} tokens, got {shown(ids)}.")
    P0 = table[torch.tensor(ids)]
    return {targets[0].path: {"lora_P0": P0, "lora_D": P - P0}}


def _of_tasks(model: nn.Module, config: Said, tensors: Tensors, targets: list[Target]) -> Values:
    found = _prompt(model, config, tensors, targets)
    found[targets[0].path] |= {"lora_U": tensors.pop("prefix_task_cols"), "lora_V": tensors.pop("prefix_task_rows")}
    return found


def _halves(tensors: Tensors, targets: list[Target]) -> list[tuple[Target, Tensor, Tensor]]:
    """Keys and values (r, d_kv) of every attention, side by side in the file."""
    whole = tensors.pop("prompt_embeddings")
    if whole.shape[1] != 2 * sum(t.d_out for t in targets):
        raise FileError(
            f"the prefix is {whole.shape[1]} wide, and keys and values of this model's {len(targets)} attentions are "
            f"{2 * sum(t.d_out for t in targets)}."
        )
    parts = iter(whole.split([t.d_out for t in targets for _ in range(2)], 1))
    return [(t, next(parts).contiguous(), next(parts).contiguous()) for t in targets]


def _prefix(model: nn.Module, config: Said, tensors: Tensors, targets: list[Target]) -> Values:
    return {t.path: {"lora_K": K, "lora_V": V} for t, K, V in _halves(tensors, targets)}


def _cartridge(model: nn.Module, config: Said, tensors: Tensors, targets: list[Target]) -> Values:
    n = config.get("num_frozen_tokens", 1)
    return {
        t.path: {"lora_K0": K, "lora_V0": V, "lora_K": 0 * K[n:], "lora_V": 0 * V[n:]}
        for t, K, V in _halves(tensors, targets)
    }


def _adaption(model: nn.Module, config: Said, tensors: Tensors, targets: list[Target]) -> Values:
    found: Values = {}
    for t in targets:
        P, g = (tensors.pop(f"{t.path}.adaption_{name}") for name in ("prompt", "gate"))
        found[t.path] = {"lora_P": P.squeeze(0), "lora_g": g.flatten()}
    return found


PROMPTS: dict[str, Prompt] = {
    "PROMPT_TUNING": Prompt("prompt_tuning", _rows, _prompt),
    "P_TUNING": Prompt("prompt_tuning", _rows, _prompt, same=False),
    "CPT": Prompt("cpt", _cpt, _moved),
    "MULTITASK_PROMPT_TUNING": Prompt("multitask_prompt_tuning", _tasks, _of_tasks),
    "PREFIX_TUNING": Prompt("prefix_tuning", _rows, _prefix),
    "CARTRIDGE": Prompt("cartridge", _frozen, _cartridge),
    "ADAPTION_PROMPT": Prompt("adaption_prompt", _attentions, _adaption),
}
"""peft_type -> how it is read."""


# ---- the other way
Written = tuple[Said, Tensors]


def _tokens(layers: list[Adapted]) -> Tensor:
    with torch.no_grad():
        return layers[0].target.variant.tokens(layers[0].view()).detach()  # type: ignore[misc]


def _written_prompt(layers: list[Adapted]) -> Written:
    return {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}, {"prompt_embeddings": _tokens(layers)}


def _written_cpt(layers: list[Adapted]) -> Written:
    cfg: Any = layers[0].cfg
    if len(cfg.start_tokens) != cfg.r:
        raise StateError("PEFT's CPT names the token of every place: start_tokens of r ids")
    types = list(cfg.token_types or (2,) * cfg.r)
    config = {
        "peft_type": "CPT",
        "cpt_token_ids": list(cfg.start_tokens),
        "cpt_mask": [1] * cfg.r,
        "cpt_tokens_type_mask": types,
        "opt_projection_epsilon": cfg.epsilon,
        "opt_projection_format_epsilon": cfg.format_epsilon,
    }
    return config, {"prompt_embeddings": _tokens(layers)}


def _written_tasks(layers: list[Adapted]) -> Written:
    first, cfg = layers[0], layers[0].cfg
    config = {"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": cfg.tasks, "num_ranks": cfg.ranks}  # type: ignore[attr-defined]
    return config | {"prompt_tuning_init": "RANDOM"}, {
        "prompt_embeddings": first["lora_P"],
        "prefix_task_cols": first["lora_U"],
        "prefix_task_rows": first["lora_V"],
    }


def _side_by_side(layers: list[Adapted]) -> Tensor:
    with torch.no_grad():
        pairs = [x.target.variant.prefix(x.view()) for x in layers]  # type: ignore[misc]
    return torch.cat([t.detach() for pair in pairs for t in pair], 1)


def _written_prefix(layers: list[Adapted]) -> Written:
    return {"peft_type": "PREFIX_TUNING", "prefix_projection": False}, {"prompt_embeddings": _side_by_side(layers)}


def _written_cartridge(layers: list[Adapted]) -> Written:
    config = {"peft_type": "CARTRIDGE", "num_frozen_tokens": layers[0].cfg.frozen}  # type: ignore[attr-defined]
    return config, {"prompt_embeddings": _side_by_side(layers)}


def _written_adaption(layers: list[Adapted]) -> Written:
    config = {
        "peft_type": "ADAPTION_PROMPT",
        "adapter_len": layers[0].cfg.r,
        "adapter_layers": len(layers),
        "target_modules": layers[0].path.rpartition(".")[2],
    }
    found: Tensors = {}
    for x in layers:
        found[f"{x.path}.adaption_prompt"] = x["lora_P"][None]
        found[f"{x.path}.adaption_gate"] = x["lora_g"]
    return config, found


PROMPT_WRITERS: dict[str, Callable[[list[Adapted]], Written]] = {
    "prompt_tuning": _written_prompt,
    "p_tuning": _written_prompt,
    "cpt": _written_cpt,
    "multitask_prompt_tuning": _written_tasks,
    "prefix_tuning": _written_prefix,
    "cartridge": _written_cartridge,
    "adaption_prompt": _written_adaption,
}
"""Method -> adapter_config.json's fields, and tensors."""


def written_prompt(model: nn.Module, record: Record, layers: list[Adapted]) -> Written:
    """adapter_config.json's fields, and tensors by their names behind PEFT's prefix.

    Raises:
        StateError: PEFT's type stands in other attentions than this adapter.
    """
    every = [x.path for x in plan(model, type(record.cfg)(variant=record.cfg.variant)).targets]
    own = [x.path for x in layers]
    uniform(layers, "r")
    config, tensors = PROMPT_WRITERS[record.cfg.variant](layers)
    top = config["peft_type"] == "ADAPTION_PROMPT"
    if own != (every[len(every) - len(own) :] if top else every):
        which = "the topmost attentions" if top else "every attention"
        raise StateError(f"PEFT's {config['peft_type']} stands in {which}, and this adapter in {listing(own)}")
    if top:
        return config, tensors
    kind, first = Attention(), layers[0]
    pairs = first.target.variant.prefix is not None
    shape = {
        "num_virtual_tokens": first.cfg.r,
        "num_layers": len(every),
        "token_dim": first.d_out if pairs else first.d_in,
        "num_attention_heads": kind.heads(first.module)[1 if pairs else 0],
        "num_transformer_submodules": 1,
    }
    return config | shape, tensors
