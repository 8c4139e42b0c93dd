"""`ll.check`: after a backward pass, does every target learn?"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..core.errors import StateError, listing
from .model.site import owned_tensors
from .model.state import state_of, unwrap


@dataclass
class CheckReport:
    """Per adapter: targets whose tensors have gradients, and those all of whose gradients are zero."""

    learning: dict[str, int]
    """Adapter -> number of targets with gradients."""
    zero: dict[str, list[str]]
    """Adapter -> paths of targets all of whose gradients are zero."""

    def __str__(self) -> str:
        lines = [f"{name}: {n} targets receive gradients" for name, n in self.learning.items()]
        lines += [f"{name}: all gradients are zero on {listing(paths)}" for name, paths in self.zero.items() if paths]
        return "\n".join(lines)

    __repr__ = __str__


def check(model: nn.Module) -> CheckReport:
    """Whether every target of every trainable adapter learns. Call it after `loss.backward()` and before
    `zero_grad()`.

    Returns:
        A report; targets all of whose gradients are zero are listed in it (frozen by the schedule, or dead).

    Raises:
        StateError: a trainable adapter has a target without gradient, or with a non-finite one. The message names the
            targets.
    """
    model = unwrap(model)
    state = state_of(model)
    report = CheckReport({}, {})
    trainable = [r for r in state.records.values() if r.trainable and (r.variant.trains or r.beside)]
    if not trainable:
        raise StateError("no attached adapter is trainable; set ll.adapters(model)[name].trainable = True.")
    active = {n for n, _ in state.active} | {n for n in state.rows or () if n}
    for record in trainable:
        grads: dict[str, list] = {path: [] for path in record.targets}
        for target, short, _, tensor in owned_tensors(model, record):
            if target.specs[short].is_trained:
                grads[target.path].append(tensor.grad)
        own = {path: gs for path, gs in grads.items() if gs}
        dead = [path for path, gs in own.items() if all(g is None for g in gs)]
        if len(dead) == len(own):
            why = (
                "it is not active" if record.name not in active else "backward did not run, or zero_grad() ran already"
            )
            raise StateError(
                f"adapter {record.name!r}: no target has a gradient ({why}). Call ll.check(model) between "
                "loss.backward() and zero_grad()."
            )
        if dead:
            raise StateError(
                f"adapter {record.name!r}: {len(dead)} of {len(own)} targets got no gradient: {listing(dead)}. They "
                "were not called as modules, or their output is not used; add them to exclude_names."
            )
        bad = [path for path, gs in own.items() if any(g is not None and not bool(g.isfinite().all()) for g in gs)]
        if bad:
            raise StateError(f"adapter {record.name!r}: gradients are not finite on {listing(bad)}.")
        report.learning[record.name] = len(own)
        report.zero[record.name] = [path for path, gs in own.items() if all(g is None or not bool(g.any()) for g in gs)]
    return report
