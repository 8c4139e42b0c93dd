"""A block in which another selection acts: one thread at a time, restored at the end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ...core.errors import SelectionError
from ..model.state import ModelState
from .recompute import changed


@contextmanager
def scope(state: ModelState) -> Iterator[None]:
    """Inside, the selection may change; afterwards it is what it was.

    Raises:
        SelectionError: another thread is inside such a block.
    """
    me = threading.get_ident()
    if state.scope_depth and state.scope_thread != me:
        raise SelectionError(
            "another thread is inside a `with ll.active(...)` or `with ll.rows(...)` block of this model; one model "
            "serves one selection at a time."
        )
    saved, depth = (state.active, state.rows), state.scope_depth
    running = state.batch, state.call
    try:
        state.scope_thread, state.scope_depth = me, depth + 1
        yield
    finally:
        inside = state.active, state.rows
        state.active, state.rows = tuple((n, w) for n, w in saved[0] if n in state.records), saved[1]
        state.batch, state.call = running  # after an exception inside a forward too
        state.scope_depth = depth
        if (state.active, state.rows) != inside:
            changed(state)


@contextmanager
def nobody_acts(state: ModelState) -> Iterator[None]:
    """The bare base inside."""
    with scope(state):
        state.active, state.rows = (), None
        yield
