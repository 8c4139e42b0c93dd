"""`ll.check`: after a backward pass, does every target learn?"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..core.arguments import checked
from ..core.errors import StateError, listing
from .call.acting import check_acts, why_unhooked
from .model.record import Record
from .model.site import owned_tensors
from .model.state import ModelState, state_of, unwrap


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


def _trains(record: Record) -> bool:
    return any(spec.is_trained for target in record.targets.values() for spec in target.specs.values())


@checked
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
    trainable = [r for r in state.records.values() if r.trainable and _trains(r)]
    if not trainable:
        raise StateError("no attached adapter is trainable; set ll.adapters(model)[name].trainable = True.")
    active = {n for n, _ in state.active} | {n for n in (state.rows.names if state.rows else ()) if n}
    report = CheckReport({}, {})
    for record in trainable:
        gradients = _gradients(model, record)
        _check_all_learn(state, record, gradients, record.name in active)
        report.learning[record.name] = len(gradients)
        report.zero[record.name] = [path for path, own in gradients.items() if not any(_nonzero(g) for g in own)]
    return report


def _gradients(model: nn.Module, record: Record) -> dict[str, list[Tensor | None]]:
    """Path of a target -> the gradients of its trained tensors."""
    found: dict[str, list[Tensor | None]] = {}
    for target, short, _, tensor in owned_tensors(model, record):
        if target.specs[short].is_trained:
            found.setdefault(target.path, []).append(tensor.grad)
    return found


def _check_all_learn(
    state: ModelState, record: Record, gradients: dict[str, list[Tensor | None]], active: bool
) -> None:
    """Raise where a target has no gradient, or one that is not finite."""
    dead = [path for path, own in gradients.items() if all(g is None for g in own)]
    consequence = "the adapter learns nothing there"
    if len(dead) == len(gradients):
        check_acts(state, record, consequence)
        why = "backward did not run, or zero_grad() ran already" if active else "it is not active"
        raise StateError(
            f"adapter {record.name!r}: no target has a gradient ({why}). Call ll.check(model) between loss.backward() "
            "and zero_grad()."
        )
    if dead:
        cause = "They were not called as modules, or their output is not used; add them to exclude_names."
        raise StateError(
            f"adapter {record.name!r}: {len(dead)} of {len(gradients)} targets got no gradient: {listing(dead)}. "
            f"{why_unhooked(state, dead, consequence) or cause}"
        )
    bad = [path for path, own in gradients.items() if not all(g is None or bool(g.isfinite().all()) for g in own)]
    if bad:
        raise StateError(f"adapter {record.name!r}: gradients are not finite on {listing(bad)}.")


def _nonzero(g: Tensor | None) -> bool:
    return g is not None and bool(g.any())
