"""PEFT's folder layout, written: `adapter_config.json` beside `adapter_model.safetensors`.

An update of low rank is written in the one form that every reader of that layout understands alike: plain LoRA of one
rank everywhere (zero-padded), the scale folded into B, lora_alpha = r as integers, no patterns, and zero tensors for
the layers of an adapted kind that this adapter leaves out. Any other method is written as the PEFT type that holds the
same function, or as the LoRA nearest to it where a rank is asked for.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..core.errors import LoraLiteWarning, StateError, listing
from ..runtime.layers.linear import dims
from ..runtime.model.record import Record
from ..runtime.targets.structure import transformer_inside
from ..runtime.view.expert import layer_views
from .adapted import EXACT, Adapted, adapted_layers, best_factors
from .peft_experts import Pair, expert_factors, packed
from .peft_names import tails
from .peft_prompts import KEYS, PROMPT_WRITERS, written_prompt
from .peft_read import CONFIG, PREFIX, WEIGHTS
from .peft_tables.written import EVERYWHERE, TRANSPOSED, WRITERS, Written, lora_names, padded, trained_rows
from .peft_whole import full_values
from .places import replaced_folder
from .tensors import write_tensors

LORA: dict[str, Any] = {
    "bias": "none",
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
}
Tensors = dict[str, Tensor]


def write_peft(
    model: nn.Module,
    record: Record,
    folder: Path,
    rank: int | None,
    base_model: str | None,
    task_type: str | None,
    plain: bool,
) -> Path:
    """Write the folder. `plain`: as LoRA, whatever the method; q and v, gate and up are then there together."""
    layers = adapted_layers(model, record)
    if record.cfg.variant in PROMPT_WRITERS:
        return _write_prompt(model, record, layers, folder, base_model, task_type)
    own = [x for x in layers if x.cfg.variant == record.cfg.variant]
    written, experts = _written(model, record, own, rank, plain)
    config = {"inference_mode": True} | (LORA if written.config["peft_type"] == "LORA" else {}) | written.config
    tensors, beside = _beside(model, record, [x for x in layers if x not in own], config)
    config |= beside | _names(model, record, written, experts)
    config |= {
        "task_type": written.config.get("task_type") or _task(model, task_type),
        "base_model_name_or_path": base_model or getattr(getattr(model, "config", None), "_name_or_path", None) or None,
    }
    tensors |= {f"{path}.{name}": t for path, own in written.layers.items() for name, t in own.items()}
    tensors = _as_inside(model, config, tensors)
    tensors = {f"{PREFIX}{key}": t for key, t in tensors.items()} | {
        f"base_model.{k}": t for k, t in written.shared.items()
    }
    return _write(folder, config, tensors)


def _write_prompt(
    model: nn.Module,
    record: Record,
    layers: list[Adapted],
    folder: Path,
    base_model: str | None,
    task_type: str | None,
) -> Path:
    """What stands before the text, whose tensors are the whole model's."""
    if record.beside:
        raise refused(record, f"beside it {record.beside[0].cfg.variant!r} stands on {record.beside[0].path}")
    try:
        config, tensors = written_prompt(model, record, layers)
    except StateError as e:
        raise refused(record, str(e)) from None
    base = base_model or getattr(getattr(model, "config", None), "_name_or_path", None) or None
    config |= {"inference_mode": True, "task_type": _task(model, task_type), "base_model_name_or_path": base}
    return _write(folder, config, {k if k in KEYS else f"{PREFIX}{k}": t for k, t in tensors.items()})


def _write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    tensors = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    with replaced_folder(folder, WEIGHTS) as new:
        write_tensors(new / WEIGHTS, tensors, {"format": "pt", "written_by": f"lora_lite {__version__}"})
        with (new / CONFIG).open("w") as f:
            f.write(json.dumps(config, indent=2, sort_keys=True) + "\n")
            f.flush()
            os.fsync(f.fileno())
    return folder


def _as_inside(model: nn.Module, config: dict[str, Any], tensors: Tensors) -> Tensors:
    """The tensors under the names that they have in the transformer inside a container, which is what readers of the
    layout load; the names in `config` are changed with them."""
    prefix, inside = transformer_inside(model)
    if not prefix or not all(key.startswith(f"{prefix}.") for key in tensors):
        return tensors
    for field in ("target_modules", "target_parameters", "modules_to_save"):
        if isinstance(config.get(field), list):
            config[field] = [name.removeprefix(f"{prefix}.") for name in config[field]]
    config["task_type"] = config["task_type"] or _task(inside, None)
    config["base_model_name_or_path"] = config["base_model_name_or_path"] or (
        getattr(getattr(inside, "config", None), "_name_or_path", None) or None
    )
    return {key.removeprefix(f"{prefix}."): t for key, t in tensors.items()}


@torch.no_grad()
def _written(
    model: nn.Module, record: Record, layers: list[Adapted], rank: int | None, plain: bool
) -> tuple[Written, list[str]]:
    """The adapter's own layers, and the names of the parameters of fused experts."""
    if record.variant.factors is not None:
        pairs = {x.path: x.factors() for x in layers}
        exact = {path: pair for path, pair in pairs.items() if pair is not None}
        return _as_lora(model, record, layers, exact, together=plain)
    if any(t.experts for t in record.targets.values()):
        raise refused(record, "its update is no pair of low-rank factors, and on experts only those are written")
    if rank is not None:
        pairs, biases = _nearest(record, layers, rank)
        if biases and plain:
            raise refused(record, f"it changes the bias of {listing(biases)}, which a plain LoRA does not")
        written, experts = _as_lora(model, record, layers, pairs, together=plain)
        if biases:
            written.config["lora_bias"] = True
            for x in layers:
                written.layers[x.path]["lora_B.bias"] = biases.get(x.path, torch.zeros(x.d_out, dtype=torch.float32))
        return written, experts
    if plain:
        raise refused(record, "its update is no pair of low-rank factors")
    if record.cfg.variant not in WRITERS:
        raise refused(record, "its update is no pair of low-rank factors, and PEFT has no type that holds it")
    try:
        written = WRITERS[record.cfg.variant](layers)
        _check_stands(written, layers)
    except StateError as e:
        raise refused(record, str(e)) from None
    return written, []


def _check_stands(written: Written, layers: list[Adapted]) -> None:
    kind = written.config["peft_type"]
    for layer in layers:
        if not layer.kind.plain_vectors and kind not in EVERYWHERE:
            raise StateError(f"PEFT's {kind} does not stand on {layer.path}, a {type(layer.module).__name__}")
        if _turned(layer.module) and kind not in TRANSPOSED:
            raise StateError(f"PEFT's {kind} does not know {layer.path}, a {type(layer.module).__name__}")


def refused(record: Record, why: str) -> StateError:
    """The error for what a layout does not hold."""
    return StateError(
        f"adapter {record.name!r} of variant {record.variant.name!r} cannot be written exactly in this layout: {why}. "
        "Ask for the nearest LoRA, ll.export(..., rank=16), which says how near it is, or export the merged model "
        "(ll.merge_and_unload(model), then model.save_pretrained)."
    )


@torch.no_grad()
def nearest_factors(record: Record, layers: list[Adapted], rank: int | None) -> dict[str, Pair]:
    """Path -> A (k, d_in) and B (d_out, k), s in B: exact for methods of low rank, else of the rank that is asked for.

    Raises:
        StateError: no rank is asked for, or the bias changes too.
    """
    if record.variant.factors is not None:
        pairs = {x.path: x.factors() for x in layers}
        return {path: pair for path, pair in pairs.items() if pair is not None}
    if rank is None:
        raise refused(record, "its update is no pair of low-rank factors")
    found, biases = _nearest(record, layers, rank)
    if biases:
        raise refused(record, f"it changes the bias of {listing(biases)}, which a plain LoRA does not")
    return found


def _nearest(record: Record, layers: list[Adapted], rank: int) -> tuple[dict[str, Pair], Tensors]:
    """Path -> the factors of this rank nearest to the change, and path -> change of the bias."""
    pairs: dict[str, Pair] = {}
    biases: Tensors = {}
    lost: dict[str, float] = {}
    for layer in layers:
        W, b = layer.change()
        pairs[layer.path], lost[layer.path] = best_factors(W, rank)
        if b is not None:
            biases[layer.path] = b
    worst = max(lost, key=lost.__getitem__)
    if lost[worst] > EXACT:
        mean = sum(lost.values()) / len(lost)
        warnings.warn(
            f"adapter {record.name!r} ({record.variant.name}) is written as a LoRA of rank {rank}, which is not the "
            f"same function: {lost[worst]:.1%} of the change of {worst} is left out, {mean:.1%} on average (relative "
            "norms).",
            LoraLiteWarning,
            stacklevel=5,
        )
    return pairs, biases


def _as_lora(
    model: nn.Module, record: Record, layers: list[Adapted], factors: dict[str, Pair], together: bool
) -> tuple[Written, list[str]]:
    """Plain LoRA of one rank."""
    banks = [v for v in layer_views(model, record) if record.targets[v.path].experts]
    of_experts = expert_factors(record.variant, banks) if banks else {}
    r = max(A.shape[0] for A, _ in (*factors.values(), *(pair for pairs in of_experts.values() for pair in pairs)))
    stacked, parameters = packed(model, of_experts, r)
    found: dict[str, Tensors] = {}
    for key, t in stacked.items():
        path, _, name = key.rpartition(".lora_")
        found.setdefault(path, {})[f"lora_{name}"] = t
    by_path = {x.path: x for x in layers}
    try:
        found |= {path: lora_names(by_path[path], *padded(*pair, r)) for path, pair in factors.items()}
    except StateError as e:
        raise refused(record, str(e)) from None
    linear = [path for path in factors if by_path[path].kind.plain_vectors]
    for path, (d_in, d_out) in _left_out(model, linear, together).items():
        found[path] = {"lora_A.weight": torch.zeros(r, d_in), "lora_B.weight": torch.zeros(d_out, r)}
    return Written({"peft_type": "LORA", "r": r, "lora_alpha": r}, found), parameters


TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of which some readers want all where one is adapted."""


def _left_out(model: nn.Module, paths: list[str], together: bool) -> dict[str, tuple[int, int]]:
    """Path -> size of every layer without an adapter that has an adapted layer's place in another block; with
    `together`, also of those that servers stack with an adapted one."""
    roles = {role(path) for path in paths}
    for names in TOGETHER if together else ():
        for path in paths:
            above, _, last = path.rpartition(".")
            roles |= {role(f"{above}.{name}") for name in names} if last in names else set()
    sizes = {path: dims(m) for path, m in model.named_modules() if path not in paths and role(path) in roles}
    return {path: size for path, size in sizes.items() if size is not None}


def role(path: str) -> str:
    """A layer's place in its block: the path without the block's number."""
    return re.sub(r"\.\d+(?=\.)", ".#", path)


def _beside(
    model: nn.Module, record: Record, layers: list[Adapted], config: dict[str, Any]
) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and config fields of what another method does beside the adapter's own."""
    with torch.no_grad():
        tensors = full_values(model, record)
    whole = [x.path for x in layers if vars(x.target.variant).get("holds") == "modules"]
    fields: dict[str, Any] = {"modules_to_save": whole or None}
    for layer in (x for x in layers if x.path not in whole):
        if layer.cfg.variant == "token_rows" and config["peft_type"] == "LORA":
            rows = fields.setdefault("trainable_token_indices", {})
            rows[layer.path] = layer["lora_ids"].tolist()
            tensors[f"{layer.path}.token_adapter.trainable_tokens_delta"] = trained_rows(layer)
        elif layer.cfg.variant == "bitfit" and config["peft_type"] == "LORA" and layer.bias is not None:
            fields["bias"] = "all"
            tensors[f"{layer.path}.bias"] = layer.bias + layer["lora_b"]
        else:
            raise refused(record, f"beside it {layer.cfg.variant!r} stands on {layer.path}")
    return tensors, fields


def _names(model: nn.Module, record: Record, written: Written, experts: list[str]) -> dict[str, Any]:
    """What names the layers of the file."""
    modules = dict(model.named_modules())
    wrapped = {path.removesuffix(".base_layer") for path in written.layers}
    linear = [path for path in written.layers if path in modules and not any(n.startswith(f"{path}.") for n in experts)]
    found: dict[str, Any] = {"target_modules": tails(linear, modules)}
    if experts:
        found["target_parameters"] = experts
    if "feedforward_modules" in written.config:
        found["feedforward_modules"] = tails(written.config["feedforward_modules"], modules)
    if written.config["peft_type"] in TRANSPOSED[:-1]:
        found["fan_in_fan_out"] = any(_turned(modules[p]) for p in wrapped if p in modules)
    return found


def _turned(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _task(model: nn.Module, asked: str | None) -> str | None:
    """PEFT's task: what is asked for, else what a model that generates from token ids alone is for."""
    if asked is not None or not hasattr(model, "generate") or getattr(model, "main_input_name", "") != "input_ids":
        return asked
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"  # type: ignore[union-attr]
