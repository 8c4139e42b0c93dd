"""A config of PEFT's as one of ours, for trainers that are handed a `peft_config`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import nn

import lora_lite as ll

from ..core.arguments import checked
from ..core.errors import ConfigError
from ..runtime.attach import attach as _attach
from ..runtime.plan import plan as _plan

UNREAD = {
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained token rows: attach ll.TokenRowsConfig beside it",
    "target_parameters": "parameters as targets: target_kinds=('experts',)",
    "lora_bias": "a bias on B",
    "alora_invocation_tokens": "activated LoRA",
    "megatron_config": "Megatron's layers",
}
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""`task_type` -> the heads that PEFT trains whole beside the adapter, those of them that a model has."""


def our_config(config: Any, model: nn.Module | None) -> ll.AdapterConfig:
    """The config of ours that means the same; one of ours is returned as it is.

    Args:
        config: an `AdapterConfig`, or PEFT's `LoraConfig`.
        model: what it will be attached to; PEFT chooses its targets by the model's type where the config names none.

    Raises:
        ConfigError: it is of another type, or says something that no field of ours says.
    """
    if isinstance(config, ll.AdapterConfig):
        return config
    kind = str(getattr(getattr(config, "peft_type", None), "value", getattr(config, "peft_type", "")))
    if kind in OTHERS:
        return _other(kind, config.to_dict(), model)
    if kind in BEFORE:
        return _before(kind, config.to_dict())
    if kind != "LORA":
        raise ConfigError(
            f"peft_config is a {type(config).__name__}; which is not translated. Give the config of ours: "
            f"ll.trainer(TrainerClass, ll.{kind or 'LoRA'}Config(...))."
        )
    return _lora(config.to_dict(), model)


def _lora(said: dict[str, Any], model: nn.Module | None) -> ll.AdapterConfig:
    """A config of PEFT's LoRA, in one of its kinds and starts."""
    for field, what in UNREAD.items():
        if said.get(field):
            raise ConfigError(f"peft_config sets {field}, which is not translated ({what}).")
    if said.get("bias", "none") != "none":
        raise ConfigError(f"peft_config sets bias={said['bias']!r}; ll.BitFitConfig trains biases.")
    cls = _starts().get(said.get("init_lora_weights", True))
    if cls is None or (said.get("use_dora") and cls is not ll.LoRAConfig):
        raise ConfigError(
            f"peft_config sets init_lora_weights={said.get('init_lora_weights')!r}, which is not translated; give a "
            "config of ours instead: ll.trainer(TrainerClass, ll.LoRAConfig(...))."
        )
    fields: dict[str, Any] = dict(
        r=said["r"],
        alpha=float(said["lora_alpha"]),
        dropout=float(said.get("lora_dropout") or 0),
        target_names=_targets(said.get("target_modules"), model),
        exclude_names=_names(said.get("exclude_modules")),
        train_modules=_names([*(said.get("modules_to_save") or ()), *_heads(said.get("task_type"), model)]),
        rank_pattern=dict(said.get("rank_pattern") or {}),
        alpha_pattern={k: float(v) for k, v in (said.get("alpha_pattern") or {}).items()},
    )
    layers = said.get("layers_to_transform")
    if layers is not None:
        fields["layers"] = (layers,) if isinstance(layers, int) else tuple(layers)
    if said.get("use_rslora"):
        fields["use_rslora"] = True
    return (ll.DoRAConfig if said.get("use_dora") else cls)(**fields)


OTHERS: dict[str, tuple[str, dict[str, str]]] = {
    "ADAMSS": ("adamss", {"r": "r", "num_subspaces": "subspaces", "subspace_rank": "subspace_rank"}),
    "ADALORA": ("adalora", {"init_r": "r", "target_r": "target_r", "lora_alpha": "alpha"}),
    "BEFT": ("bitfit", {}),
    "BOFT": ("boft", {"boft_block_size": "block_size", "boft_n_butterfly_factor": "n_factors"}),
    "C3A": ("c3a", {"block_size": "block"}),
    "DEFT": ("deft", {"r": "r", "alpha": "alpha", "decomposition_method": "projection"}),
    "DELORA": ("delora", {"r": "r", "delora_lambda": "strength"}),
    "FOURIERFT": ("fourierft", {"n_frequency": "n", "scaling": "strength"}),
    "GRALORA": ("gralora", {"r": "r", "alpha": "alpha", "gralora_k": "k", "hybrid_r": "general"}),
    "HIRA": ("hira", {"r": "r"}),
    "HRA": ("hra", {"r": "r"}),
    "IA3": ("ia3", {}),
    "LILY": ("lily", {"r": "r", "stride_A": "stride", "num_B": "experts"}),
    "LN_TUNING": ("whole", {}),
    "LOHA": ("loha", {"r": "r", "alpha": "alpha"}),
    "LOKR": ("lokr", {"r": "r", "alpha": "alpha", "decompose_factor": "factor", "decompose_both": "factor_both"}),
    "MISS": ("miss", {"r": "r"}),
    "OFT": ("oft", {"oft_block_size": "block_size"}),
    "PEANUT": ("peanut", {"r": "r", "depth": "depth", "act_fn": "activation"}),
    "POLY": ("poly", {"r": "r", "n_tasks": "tasks", "n_skills": "skills", "n_splits": "splits"}),
    "PSOFT": ("psoft", {"r": "r"}),
    "PVERA": ("pvera", {"r": "r", "d_initial": "d_initial"}),
    "RANDLORA": ("randlora", {"r": "r", "randlora_alpha": "alpha"}),
    "ROAD": ("road", {"group_size": "group_size"}),
    "SHIRA": ("shira", {"r": "r"}),
    "TINYLORA": ("tinylora", {"r": "r", "u": "u", "weight_tying": "tying"}),
    "TRAINABLE_TOKENS": ("token_rows", {"token_indices": "token_ids"}),
    "UNILORA": ("unilora", {"r": "r", "theta_d_length": "length"}),
    "VBLORA": ("vblora", {"r": "r", "num_vectors": "vectors", "vector_length": "length", "topk": "topk"}),
    "VERA": ("vera", {"r": "r", "d_initial": "d_initial"}),
    "WAVEFT": ("waveft", {"n_frequency": "n", "scaling": "strength"}),
}
"""peft_type -> the method here, and PEFT's fields by the names of ours. Where targets are found is translated alike."""
BEFORE: dict[str, tuple[str, dict[str, str]]] = {
    "PROMPT_TUNING": ("prompt_tuning", {"num_virtual_tokens": "r"}),
    "P_TUNING": ("p_tuning", {"num_virtual_tokens": "r", "encoder_hidden_size": "hidden"}),
    "PREFIX_TUNING": ("prefix_tuning", {"num_virtual_tokens": "r"}),
    "MULTITASK_PROMPT_TUNING": (
        "multitask_prompt_tuning",
        {"num_virtual_tokens": "r", "num_tasks": "tasks", "num_ranks": "ranks"},
    ),
    "CARTRIDGE": ("cartridge", {"num_virtual_tokens": "r", "num_frozen_tokens": "frozen"}),
    "CPT": (
        "cpt",
        {
            "num_virtual_tokens": "r",
            "cpt_token_ids": "start_tokens",
            "cpt_tokens_type_mask": "token_types",
            "opt_projection_epsilon": "epsilon",
            "opt_projection_format_epsilon": "format_epsilon",
        },
    ),
    "ADAPTION_PROMPT": ("adaption_prompt", {"adapter_len": "r"}),
}
"""The same of what stands before the text, which has no targets to choose."""


def _other(kind: str, said: dict[str, Any], model: nn.Module | None) -> ll.AdapterConfig:
    """A config of any type but LoRA's."""
    name, names = OTHERS[kind]
    method = ll.get_variant(name)
    fields: dict[str, Any] = {ours: said[theirs] for theirs, ours in names.items() if said.get(theirs) is not None}
    fields |= {"target_names": _targets(said.get("target_modules"), model, kind), "variant": name}
    fields |= {
        "exclude_names": _names(said.get("exclude_modules")),
        "train_modules": _names([*(said.get("modules_to_save") or ()), *_heads(said.get("task_type"), model)]),
    }
    layers = said.get("layers_to_transform")
    if layers is not None:
        fields["layers"] = (layers,) if isinstance(layers, int) else tuple(layers)
    fields |= _turned(kind, said)
    if "alpha" in fields:
        fields["alpha"] = float(fields["alpha"])
    lists: dict[str, Any] = {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
    return method.config(**(fields | lists))


def _before(kind: str, said: dict[str, Any]) -> ll.AdapterConfig:
    """A config of a prompt or a prefix."""
    if said.get("prefix_projection") or said.get("modules_to_save"):
        raise ConfigError("peft_config sets prefix_projection or modules_to_save, which are not translated.")
    name, names = BEFORE[kind]
    fields = {ours: said[theirs] for theirs, ours in names.items() if said.get(theirs) is not None}
    if kind == "ADAPTION_PROMPT":  # the topmost blocks
        fields["layers"] = tuple(range(-said["adapter_layers"], 0))
    return ll.get_variant(name).config(variant=name, **fields)


def _turned(kind: str, said: dict[str, Any]) -> dict[str, Any]:
    """Fields whose values are others here."""
    if kind == "IA3":
        return {"input_names": _names(said.get("feedforward_modules"))}
    if kind == "ROAD":
        return {"per_pair": int(str(said.get("variant", "road_1"))[-1])}
    if kind == "OFT":
        terms = said.get("num_cayley_neumann_terms", 5) if said.get("use_cayley_neumann", True) else 0
        return {"neumann_terms": terms}
    if kind == "ADALORA":  # which PEFT leaves at 8 below a smaller first rank
        return {"target_r": min(said["target_r"], said["init_r"])}
    if kind == "POLY":
        return {"alpha": 1.0}
    if kind == "LILY":
        return {"alpha": said.get("scaling", 1.0) * said["r"]}
    if kind == "RANDLORA":
        return {"pairing": "peft"}
    if kind == "PEANUT":
        return {"alpha": said.get("scaling", 1.0) * said["r"]}
    if kind == "LN_TUNING":
        return {"target_kinds": ("norm", "linear")}
    return {"target_kinds": ("embedding",)} if kind == "TRAINABLE_TOKENS" else {}


P = ParamSpec("P")
T = TypeVar("T")


def taking_peft(verb: Callable[Concatenate[nn.Module, Any, P], T]) -> Callable[Concatenate[nn.Module, Any, P], T]:
    """`ll.attach` and `ll.plan` that take a config of PEFT's too."""

    @functools.wraps(verb)
    def found(model: nn.Module, cfg: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        return verb(model, our_config(cfg, model) if hasattr(cfg, "peft_type") else cfg, *args, **kwargs)

    return found


attach, plan = checked(taking_peft(_attach)), checked(taking_peft(_plan))


def _starts() -> dict[Any, type[ll.AdapterConfig]]:
    """`init_lora_weights` -> the config of the method that starts so."""
    return {
        True: ll.LoRAConfig,
        "pissa": ll.PiSSAConfig,
        "olora": ll.OLoRAConfig,
        "eva": ll.EVAConfig,
        "corda": ll.CorDAConfig,
    }


def _heads(task: Any, model: nn.Module | None) -> list[str]:
    """The heads of this task that the model has."""
    known = HEADS.get(str(getattr(task, "value", task)), ())
    there = {path.rsplit(".", 1)[-1] for path, _ in model.named_modules()} if model is not None else set()
    return [name for name in known if name in there]


def _targets(said: str | Iterable[str] | None, model: nn.Module | None, kind: str = "LORA") -> tuple[str, ...] | None:
    """Patterns for PEFT's target_modules; what PEFT chooses for the model's type where there are none."""
    if said == "all-linear":
        return None
    if said:
        return _names(said)
    from peft.utils import constants

    table = f"TRANSFORMERS_MODELS_TO_{kind}_TARGET_MODULES_MAPPING"
    defaults = getattr(constants, table, constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in defaults:
        raise ConfigError(f"peft_config names no target_modules, and PEFT has none for a model of type {family!r}.")
    return _names(defaults[family])


def _names(said: str | Iterable[str] | None) -> tuple[str, ...]:
    """A regular expression as it is, names as patterns of themselves."""
    if isinstance(said, str):
        return (said,)
    return tuple(re.escape(name) for name in sorted(set(said or ())))
