"""State of the base that is no parameter: running figures of norms are held while an adapter is attached, and any other
buffer that moves in training is found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..._torch import persistent_buffers
from .site import adapter_attributes
from .undo import Undo

Seen = dict[str, tuple[int, int]]
"""Path of a buffer -> which tensor it is, and how often that was written."""
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
"""Without tracking they would normalise by the input in evaluation too, so they cannot be held."""


def norms_with_figures(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, norm) of those that average what they see in training, to use it in evaluation."""
    for path, module in model.named_modules():
        tracks = getattr(module, "track_running_stats", None) is True and not isinstance(module, INSTANCE_NORMS)
        if tracks and all(isinstance(module._buffers.get(k), Tensor) for k in ("running_mean", "running_var")):
            yield path, module


def hold(model: nn.Module, undo: Undo) -> list[str]:
    """Let training leave the figures as they are: it normalises by the batch, as before, and averages nothing. Returns
    the paths of the norms."""
    held = list(norms_with_figures(model))
    for _, module in held:
        undo(lambda m=module: _track(m, True))
        _track(module, False)
    return [path for path, _ in held]


def release(model: nn.Module, held: list[str], undo: Undo) -> None:
    """Let the figures move again."""
    modules = dict(model.named_modules())
    for module in (modules[path] for path in held if path in modules):
        undo(lambda m=module: _track(m, False))
        _track(module, True)


def _track(module: Any, value: bool) -> None:
    module.track_running_stats = value


def look(model: nn.Module) -> Seen:
    """The base's buffers that a checkpoint would hold, as they are now."""
    seen: Seen = {}
    for path, module in model.named_modules():
        own = adapter_attributes(module) if module._buffers else set()
        for name, t in persistent_buffers(module):
            if name not in own and not t.is_inference():  # which counts no writes
                seen[f"{path}.{name}" if path else name] = id(t), t._version
    return seen
