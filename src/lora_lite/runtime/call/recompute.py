"""Which selection a hook must use, also when gradient checkpointing runs a forward again inside backward."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..._torch import backward_is_running, inside_checkpoint, inside_reentrant_checkpoint
from ...core.errors import LoraLiteWarning, SelectionError
from ..model.call import Selection
from ..model.state import ModelState


def selection_of(state: ModelState) -> Selection:
    """(active adapters with weights, one adapter per row or None, token positions or None) for the running forward.

    A recomputation in backward may run after the `with` block of its forward and on another thread: it gets the
    selection of the checkpointed forward that waits for it. Two such forwards under different selections cannot be told
    apart, so they raise.
    """
    chosen: Selection = (state.active, state.rows, state.call)
    if torch.compiler.is_compiling():
        if inside_checkpoint() and not state.compiled_checkpoint:
            state.compiled_checkpoint = True
        return chosen
    if not backward_is_running():
        if in_checkpoint(state):
            if state.pending_done:
                state.pending, state.pending_done = [], False
            if chosen not in state.pending:
                state.pending.append(chosen)
        return chosen
    if len(state.pending) > 1:
        state.pending_done = True  # the next step starts anew
        raise SelectionError(
            "gradient checkpointing recomputes a forward in backward, but checkpointed forwards ran under several "
            f"adapter selections or prompts ({', '.join(_show(s) for s in state.pending)}) and it cannot be told "
            "which one this is. Call backward before the next forward, run reference passes under torch.no_grad(), "
            "or switch gradient checkpointing off."
        )
    if not state.pending:
        return chosen
    state.pending_done = True
    return state.pending[0]


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


def in_checkpoint(state: ModelState) -> bool:
    """Whether a checkpointed region is running forward for the first time."""
    if torch.is_grad_enabled():
        return inside_checkpoint()
    if state.call_grad:  # and none here: a reentrant checkpoint, or the model's own no_grad
        state.cut_by_checkpoint = True
        return True
    return not state.in_call and inside_reentrant_checkpoint()  # the search is long


def _show(selection: Any) -> str:
    active, rows, _ = selection
    return f"rows {list(rows)}" if rows is not None else str([n for n, _ in active] or None)
