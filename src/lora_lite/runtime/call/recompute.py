"""Which selection a hook must use, also when gradient checkpointing runs a forward again inside backward."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..._torch import backward_is_running, inside_checkpoint, inside_reentrant_checkpoint
from ...core.errors import LoraLiteWarning, SelectionError
from ..model.call import Running, Selection
from ..model.state import ModelState


def selection_of(state: ModelState) -> Selection:
    """What acts in the running forward: what its call of the model began with, in whatever thread it runs.

    A recomputation in backward may run after the `with` block of its forward and on another thread: it gets the
    selection of the checkpointed forward that waits for it. Two such forwards under different selections cannot be told
    apart, so they raise.
    """
    now = state.here.now
    chosen = now.selection or (*state.selected, None, None)
    if torch.compiler.is_compiling():
        if inside_checkpoint() and not state.compiled_checkpoint:
            state.compiled_checkpoint = True
        return chosen
    if not backward_is_running():
        if in_checkpoint(now):
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


def in_checkpoint(now: Running) -> bool:
    """Whether a checkpointed region is running forward for the first time."""
    if torch.is_grad_enabled():
        return inside_checkpoint()
    if now.grad:  # and none here: a reentrant checkpoint, or the model's own no_grad
        now.cut_by_checkpoint = True
        return True
    return not now.in_call and inside_reentrant_checkpoint()  # the search is long


def _show(selection: Any) -> str:
    active, rows, *_ = selection
    return f"rows {list(rows.names)}" if rows is not None else str([n for n, _ in active] or None)
