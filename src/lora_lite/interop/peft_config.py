"""A config of PEFT's as one of ours, for trainers that are handed a `peft_config`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

import lora_lite as ll

from ..core.errors import ConfigError

UNREAD = {
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained token rows: attach ll.TokenRowsConfig beside it",
    "target_parameters": "parameters as targets: target_kinds=('experts',)",
    "lora_bias": "a bias on B",
    "alora_invocation_tokens": "activated LoRA",
    "megatron_config": "Megatron's layers",
}


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
    if kind != "LORA":
        raise ConfigError(
            f"peft_config is a {type(config).__name__}; only LoraConfig is translated. Give the config of ours: "
            f"ll.trainer(TrainerClass, ll.{kind or 'LoRA'}Config(...))."
        )
    said: dict[str, Any] = config.to_dict()
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
        train_modules=_names(said.get("modules_to_save")),
        rank_pattern=dict(said.get("rank_pattern") or {}),
        alpha_pattern={k: float(v) for k, v in (said.get("alpha_pattern") or {}).items()},
    )
    layers = said.get("layers_to_transform")
    if layers is not None:
        fields["layers"] = (layers,) if isinstance(layers, int) else tuple(layers)
    if said.get("use_rslora"):
        fields["use_rslora"] = True
    return (ll.DoRAConfig if said.get("use_dora") else cls)(**fields)


def _starts() -> dict[Any, type[ll.AdapterConfig]]:
    """`init_lora_weights` -> the config of the method that starts so."""
    return {
        True: ll.LoRAConfig,
        "pissa": ll.PiSSAConfig,
        "olora": ll.OLoRAConfig,
        "eva": ll.EVAConfig,
        "corda": ll.CorDAConfig,
    }


def _targets(said: str | Iterable[str] | None, model: nn.Module | None) -> tuple[str, ...] | None:
    """Patterns for PEFT's target_modules; what PEFT chooses for the model's type where there are none."""
    if said == "all-linear":
        return None
    if said:
        return _names(said)
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in DEFAULTS:
        raise ConfigError(f"peft_config names no target_modules, and PEFT has none for a model of type {kind!r}.")
    return _names(DEFAULTS[kind])


def _names(said: str | Iterable[str] | None) -> tuple[str, ...]:
    """A regular expression as it is, names as patterns of themselves."""
    if isinstance(said, str):
        return (said,)
    return tuple(re.escape(name) for name in sorted(said or ()))
