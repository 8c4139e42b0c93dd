"""State of the base that is no parameter: running figures of norms are held while an adapter is attached, and any other
buffer that moves in training is found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..._torch import persistent_buffers
from .site import adapter_attributes
from .undo import Undo

Held = dict[str, tuple[str, Any]]
"""Path of a norm -> the attribute that was changed to hold its figures, and its value before."""
Seen = dict[str, tuple[int, int]]
"""Path of a buffer -> which tensor it is, and how often that was written."""
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
STILL: dict[str, Any] = {"track_running_stats": False, "momentum": 0.0}
"""Attribute -> value with which training leaves the running figures alone and evaluation uses them."""


def norms_with_figures(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, norm) of those that average what they see in training, to use it in evaluation."""
    for path, module in model.named_modules():
        figures = (module._buffers.get(k) for k in ("running_mean", "running_var"))
        if getattr(module, "track_running_stats", None) is True and all(isinstance(t, Tensor) for t in figures):
            yield path, module


def hold(model: nn.Module, undo: Undo) -> Held:
    """Let training leave the figures as they are: it normalises by the batch, as before, and averages nothing."""
    held: Held = {}
    for path, module in norms_with_figures(model):
        # an instance norm that tracks nothing would normalise by the input in evaluation too
        attribute = "momentum" if isinstance(module, INSTANCE_NORMS) else "track_running_stats"
        held[path] = attribute, getattr(module, attribute)
        undo(lambda m=module, a=attribute, value=held[path][1]: setattr(m, a, value))
        setattr(module, attribute, STILL[attribute])
    return held


def release(model: nn.Module, held: Held, undo: Undo) -> None:
    """Let the figures move again, where nobody else has changed what they depend on."""
    modules = dict(model.named_modules())
    for path, (attribute, value) in held.items():
        module = modules.get(path)
        if module is not None and getattr(module, attribute, None) == STILL[attribute]:
            undo(lambda m=module, a=attribute: setattr(m, a, STILL[a]))
            setattr(module, attribute, value)


def look(model: nn.Module) -> Seen:
    """The base's buffers that a checkpoint would hold, as they are now."""
    seen: Seen = {}
    for path, module in model.named_modules():
        own = adapter_attributes(module) if module._buffers else set()
        for name, t in persistent_buffers(module):
            if name not in own and not t.is_inference():  # which counts no writes
                seen[f"{path}.{name}" if path else name] = id(t), t._version
    return seen
