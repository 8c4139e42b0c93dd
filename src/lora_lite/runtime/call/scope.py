"""A block in which another selection acts: one thread at a time, restored at the end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ...core.errors import SelectionError
from ..model.state import ModelState, not_called_elsewhere, state_of, unwrap
from ..model.undo import surely
from .recompute import changed


@contextmanager
def scope(model: nn.Module, what: str) -> Iterator[ModelState]:
    """Inside, the selection may change; afterwards it is what it was.

    Raises:
        SelectionError: another thread is inside such a block, or runs a call of the model.
    """
    model, me = unwrap(model), threading.get_ident()
    state = state_of(model)
    if state.scope_depth and state.scope_thread != me:
        raise SelectionError(
            "another thread is inside a `with ll.active(...)` or `with ll.rows(...)` block of this model; one model "
            "serves one selection at a time."
        )
    not_called_elsewhere(model, what)
    saved, depth, running = state.selected, state.scope_depth, state.here.now.selection

    def restore() -> None:
        inside = state.selected
        state.put((tuple((n, w) for n, w in saved[0] if n in state.records), saved[1]))
        state.here.now.selection = running  # after an exception inside a forward too
        state.scope_depth = depth
        if state.selected != inside:
            changed(state)

    with surely(restore):
        state.scope_thread, state.scope_depth = me, depth + 1
        yield state


@contextmanager
def nobody_acts(model: nn.Module) -> Iterator[None]:
    """The bare base inside."""
    with scope(model, "calibration") as state:
        state.select(())
        yield
