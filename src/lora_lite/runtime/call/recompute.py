"""Which selection a hook must use, also when gradient checkpointing runs a forward again inside backward."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..._torch import backward_is_running, function_cuts, inside_checkpoint, inside_reentrant_checkpoint
from ...core.errors import LoraLiteWarning, SelectionError, listing
from ..model.call import Running, Selection
from ..model.site import Site
from ..model.state import ModelState, acting_names
from .batch import values_of


def selection_of(site: Site) -> Selection:
    """What acts in the running forward: what its call of the model began with, in whatever thread it runs.

    A recomputation in backward may run after the `with` block of its forward and on another thread: it gets the
    selection of the checkpointed forward that waits for it. Two such forwards under different selections cannot be told
    apart, so they raise.
    """
    state = site.state
    now = state.here.now
    chosen = now.selection or (*state.choice(), None, None)
    if torch.compiler.is_compiling():
        if inside_checkpoint() and not state.compiled_checkpoint:
            state.compiled_checkpoint = True
        return chosen
    if not backward_is_running():
        if _in_checkpoint(site, now):
            _await(state, now, chosen)
        return chosen
    waiting = _waiting(state, now)
    if len(waiting) > 1:
        _done(state, now)  # the next step starts anew
        raise SelectionError(
            "gradient checkpointing recomputes a forward in backward, but checkpointed forwards ran under several "
            f"adapter selections or prompts ({', '.join(_show(s) for s in waiting)}) and it cannot be told "
            "which one this is. Call backward before the next forward, run reference passes under torch.no_grad(), "
            "or switch gradient checkpointing off."
        )
    if not waiting:
        return chosen
    _done(state, now)
    return waiting[0]


def _await(state: ModelState, now: Running, chosen: Selection) -> None:
    """Note the selection of a checkpointed forward for its recomputation."""
    if now.pending_done:
        now.pending, now.pending_done = [], False
    if chosen not in now.pending:
        now.pending.append(chosen)
        state.waiting.add(now)


def _waiting(state: ModelState, now: Running) -> list[Selection]:
    """The selections of this thread's checkpointed forwards; of all threads' where it had none, as the threads of the
    autograd engine."""
    if now.pending:
        return now.pending
    found: list[Selection] = []
    for other in list(state.waiting):
        found += [selection for selection in list(other.pending) if selection not in found]
    return found


def _done(state: ModelState, now: Running) -> None:
    """The backward pass of the waiting forwards has begun: the next forward starts a new list."""
    for one in [now] if now.pending else list(state.waiting):
        one.pending_done = True


def changed(state: ModelState) -> None:
    """Say once that compiled blocks inside a checkpoint are recomputed under the selection of the backward pass, which
    nothing can tell from inside."""
    if state.compiled_checkpoint and torch.is_grad_enabled() and not state.compiled_checkpoint_noted:
        state.compiled_checkpoint_noted = True
        warnings.warn(
            "blocks were compiled inside gradient checkpoints, which run them again in backward under the selection "
            "of that moment: call backward before the selection of adapters changes, or compile the whole model "
            "instead of its blocks.",
            LoraLiteWarning,
            stacklevel=4,
        )


def _in_checkpoint(site: Site, now: Running) -> bool:
    """Whether a checkpointed region is running forward for the first time."""
    state = site.state
    if torch.is_grad_enabled():
        return inside_checkpoint()
    if now.grad:  # and none here: a reentrant checkpoint, or the model's own no_grad
        if site.path not in state.gradless:
            state.gradless[site.path] = function_cuts()
            now.newly_gradless.append(site.path)
            site.awaited = True  # it may run again, with a gradient
        return True
    return not now.in_call and inside_reentrant_checkpoint()  # the search is long


def check_fed(state: ModelState, output: Any) -> None:
    """After a training call in which layers ran without a gradient: name the targets that no gradient reaches.

    Raises:
        SelectionError: a reentrant checkpoint cut them off.
    """
    now, names = state.here.now, acting_names(state)
    trained = {p for n in names if (r := state.records[n]).trainable and r.variant.trains for p in r.targets}
    cut = {p: state.gradless.get(p) for p in now.newly_gradless if p in trained and p not in now.fed}
    _check_cut(state, [path for path, by_checkpoint in cut.items() if by_checkpoint], len(trained), output)
    bare = [path for path, by_checkpoint in cut.items() if by_checkpoint is None]
    if bare and not state.cut_noted:
        state.cut_noted = True
        warnings.warn(
            f"{listing(bare)} ran under the model's own torch.no_grad() in a training call, so the adapter does not "
            "train there. Leave them out (exclude_names), or let the model run them with gradients.",
            LoraLiteWarning,
            stacklevel=4,
        )


def _check_cut(state: ModelState, lost: list[str], n_trained: int, output: Any) -> None:
    """Raise where a reentrant checkpoint cut these targets off, or the whole output."""
    whole = n_trained and any(how is not None for how in state.gradless.values()) and not has_gradient(output)
    state.gradless = {path: how for path, how in state.gradless.items() if not how}  # what was cut is asked again
    if not (lost or whole):
        return
    what = f"{len(lost)} of {n_trained} targets would not train: {listing(lost)}" if lost else "no adapter would train"
    raise SelectionError(
        "gradient checkpointing with use_reentrant=True runs blocks without gradient because no input of theirs "
        f"requires one, so {what}. Call model.enable_input_require_grads(), or enable checkpointing with "
        "use_reentrant=False."
    )


def has_gradient(output: Any) -> bool:
    """Whether some tensor of an output has one."""
    return any(isinstance(v, Tensor) and v.requires_grad for v in values_of(output))


def _show(selection: Any) -> str:
    active, rows, *_ = selection
    return f"rows {list(rows.names)}" if rows is not None else str([n for n, _ in active] or None)
