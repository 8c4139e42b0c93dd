"""What other code does to an adapted model or asks of it: `load_state_dict`, `save_pretrained`, a trainer of quantised
models. Done right, or said what to type instead."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from .._torch import frame_of
from ..core.errors import LoraLiteWarning, StateError
from .model.record import Record
from .model.site import adapter_attributes, place
from .model.state import SITE, STATE, ModelState

NEAR, NEAR_SAVING = 8, 20
"""How many frames above a hook of torch's the function stands that the user called; more of them where a state dict is
asked from module to module."""
WRITERS = (("save_pretrained", ""), ("save_model", "accelerate."))
"""(function, package) of those who write a state dict that only they read."""


def before_load_state_dict(
    model: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """torch's error of a strict load lists the adapter's tensors among hundreds; the cure stands in front of them."""
    state: ModelState = model.__dict__[STATE]
    frame = frame_of("load_state_dict", "torch.", within=NEAR)  # `strict` is True here whatever the user said
    if frame is None or not frame.f_locals.get("strict", True):
        return
    for name, record in state.records.items():
        keys = [prefix + k for k in _keys(record)]
        absent = sum(k not in state_dict for k in keys)
        if keys and absent:
            errors.append(
                f"{absent} of the {len(keys)} tensors of adapter {name!r} are not in this state dict. If it holds the "
                "base alone: load it before ll.attach, or with strict=False, which leaves the adapter as it is. An "
                "adapter's own file: ll.load(model, path)."
            )


def after_state_dict(model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """`save_pretrained`, of any library and however deep inside the model, and accelerate's `save_model` write the
    merged weights alone of a merged model; of any other they write tensors that are dropped by who reads the file.

    It hangs on the model and on each module inside that has a `save_pretrained` of its own.
    """
    if model.__dict__.get(STATE) is None and prefix:  # part of a larger model, which is saved itself
        return
    writer = next((f for f, package in WRITERS if frame_of(f, package, within=NEAR_SAVING) is not None), None)
    sites = {path: m.__dict__[SITE] for path, m in model.named_modules() if SITE in m.__dict__}
    if writer is None or not sites:
        return
    state: ModelState = next(iter(sites.values())).state
    if state.merged is not None:
        for path, module in model.named_modules():
            for attribute in adapter_attributes(module):
                state_dict.pop(f"{prefix}{path}.{attribute}" if path else prefix + attribute, None)
        return
    warnings.warn(
        f"{writer} writes the base and the tensors of {', '.join(map(repr, state.records))} into one "
        "checkpoint, of which who loads it reads the base alone. The adapter: ll.save(model, "
        "'adapter.safetensors') or ll.export(model, folder). A plain model with the adapter in its weights: "
        "ll.merge(model) first.",
        LoraLiteWarning,
        stacklevel=2,
    )


class Trainable:
    """Stands on a quantised model where transformers notes that PEFT has put an adapter on it: true for a Trainer,
    which asks whether anything trains, and false for those who ask whether PEFT is to save and load."""

    NAME = "_hf_peft_config_loaded"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __bool__(self) -> bool:
        asks = frame_of("validate_quantization_for_training", "transformers.", 1) or frame_of(
            "__init__", "transformers.trainer", 1
        )
        state: ModelState | None = self.model.__dict__.get(STATE)
        if asks is None or state is None or not any(record.trainable for record in state.records.values()):
            return False
        quantizer: Any = self.model.hf_quantizer
        if not quantizer.is_trainable:
            raise StateError(
                f"the base is quantised by {type(quantizer).__name__}, which passes no gradients, so adapters in it "
                "cannot be trained; load it with bitsandbytes or another quantiser that can."
            )
        return True

    @classmethod
    def put_on(cls, model: nn.Module) -> None:
        """Where the model is quantised by transformers, and PEFT has not been there."""
        if getattr(model, "is_quantized", False) and getattr(model, "hf_quantizer", None) is not None:
            model.__dict__.setdefault(cls.NAME, cls(model))

    @classmethod
    def take_off(cls, model: nn.Module) -> None:
        """With the last adapter."""
        if isinstance(model.__dict__.get(cls.NAME), cls):
            del model.__dict__[cls.NAME]


def savers(model: nn.Module) -> Iterator[nn.Module]:
    """Modules inside a model that can be saved on their own, as the encoder of a sentence-transformer."""
    return (m for m in model.modules() if m is not model and callable(getattr(m, "save_pretrained", None)))


def _keys(record: Record) -> list[str]:
    places = [place(t, short, record.name) for t in record.targets.values() for short in t.specs]
    return [f"{path}.{attribute}" if path else attribute for path, attribute in places]
