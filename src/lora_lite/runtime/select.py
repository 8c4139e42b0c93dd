"""Which adapters act: `activate`, and the scopes `active` and `rows`. Plain state of the model, so that compilers see it change."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from ..core.errors import SelectionError, StateError, did_you_mean
from .recompute import changed
from .state import ModelState, outside_scope, state_of

Choice = str | Sequence[str] | Mapping[str, float] | None


def activate(model: nn.Module, choice: Choice) -> None:
    """Choose the adapters that act from now on: a name, several names, {name: weight}, or None for the bare base.

    Several act in attach order. Weight w of an adapter f means y + w (f(x, y) - y).

    Raises:
        StateError: an unknown name or a merged model. SelectionError: inside a scope, or from a second thread.
    """
    state = state_of(model)
    outside_scope(state, "ll.activate")
    state.active, old = _resolve(state, choice), state.active
    if state.active != old:
        changed(state)


@contextmanager
def active(model: nn.Module, choice: Choice) -> Iterator[None]:
    """`with ll.active(model, "a"):` acts like `activate` inside the block and restores the selection afterwards, after exceptions too."""
    state = state_of(model)
    with _scope(state):
        state.active, state.rows = _resolve(state, choice), None
        yield


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """`with ll.rows(model, ["a", None, "b"]):` one adapter per batch row; None is the bare base. Beam search may repeat rows.

    Raises:
        StateError: an unknown name or a merged model. SelectionError: a batch that does not fit, from a second thread.
    """
    state = state_of(model)
    if isinstance(names, str) or not names:
        raise SelectionError("ll.rows takes a list with one adapter name or None per batch row.")
    for name in dict.fromkeys(names):
        if name is not None:
            _known(state, name)
    _not_merged(state)
    with _scope(state):
        state.rows = tuple(names)
        state.row_epoch += 1
        yield


@contextmanager
def _scope(state: ModelState) -> Iterator[None]:
    me = threading.get_ident()
    if state.scope_depth and state.scope_thread != me:
        raise SelectionError(
            "another thread is inside a `with ll.active(...)` or `with ll.rows(...)` block of this model; one model serves one selection at a time."
        )
    saved = state.active, state.rows
    running = state.batch, state.call
    state.scope_thread, state.scope_depth = me, state.scope_depth + 1
    try:
        yield
    finally:
        inside = state.active, state.rows
        state.active, state.rows = tuple((n, w) for n, w in saved[0] if n in state.records), saved[1]
        state.batch, state.call = running  # after an exception inside a forward too
        state.scope_depth -= 1
        if (state.active, state.rows) != inside:
            changed(state)


def _resolve(state: ModelState, choice: Choice) -> tuple[tuple[str, float], ...]:
    if choice is None:
        weights: dict[str, float] = {}
    elif isinstance(choice, str):
        weights = {choice: 1.0}
    elif isinstance(choice, Mapping):
        weights = {name: float(w) for name, w in choice.items()}
    else:
        weights = dict.fromkeys(choice, 1.0)
    for name, w in weights.items():
        _known(state, name)
        if not math.isfinite(w):
            raise SelectionError(f"the weight of adapter {name!r} must be finite, got {w}.")
    _not_merged(state)
    return tuple((name, weights[name]) for name in state.records if name in weights)


def _known(state: ModelState, name: str) -> None:
    if name not in state.records:
        raise StateError(
            f"no adapter is called {name!r}.{did_you_mean(name, state.records)} Attached: {list(state.records)}."
        )


def _not_merged(state: ModelState) -> None:
    if state.merged is not None:
        raise StateError("the model is merged; call ll.unmerge(model) before choosing adapters.")
