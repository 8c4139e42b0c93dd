"""What other code does to an adapted model: `load_state_dict`, `save_pretrained`, `resize_token_embeddings`. Done
right, or said what to type instead."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from .._torch import frame_of
from ..core.errors import LoraLiteWarning
from .model.record import Record
from .model.site import place
from .model.state import STATE, ModelState

NEAR = 8
"""How many frames above a hook of torch's the function stands that the user called."""


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
    """`save_pretrained` of a merged model writes the merged weights alone; of any other it writes tensors that
    `from_pretrained` drops."""
    state: ModelState = model.__dict__[STATE]
    if frame_of("save_pretrained", "transformers.", within=NEAR) is None:
        return
    if state.merged is not None:
        for record in state.records.values():
            for key in _keys(record):
                state_dict.pop(prefix + key, None)
        return
    warnings.warn(
        f"save_pretrained writes the base and the tensors of {', '.join(map(repr, state.records))} into one "
        "checkpoint, of which from_pretrained reads the base alone. The adapter: ll.save(model, "
        "'adapter.safetensors') or ll.export(model, folder). A plain model with the adapter in its weights: "
        "ll.merge(model) first.",
        LoraLiteWarning,
        stacklevel=2,
    )


def _keys(record: Record) -> list[str]:
    places = [place(t, short, record.name) for t in record.targets.values() for short in t.specs]
    return [f"{path}.{attribute}" if path else attribute for path, attribute in places]
