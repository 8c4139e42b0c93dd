"""Which adapters act: `activate`, and the scopes `active` and `rows`. Plain state of the model, so that compilers see
it change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import SelectionError, StateError, did_you_mean
from .call.recompute import changed
from .call.scope import scope
from .model.call import Prompt
from .model.state import ModelState, not_merged, outside_scope, state_of

Choice = str | Sequence[str] | Mapping[str, float] | None


def activate(model: nn.Module, choice: Choice) -> None:
    """Choose the adapters that act from now on: a name, several names, {name: weight}, or None for the bare base.

    Several act in attach order. Weight w of an adapter f means y + w (f(x, y) - y).

    Raises:
        StateError: an unknown name or a merged model.
        SelectionError: inside a scope, or from a second thread.
    """
    state = state_of(model)
    outside_scope(state, "ll.activate")
    state.active, old = _resolve(state, choice), state.active
    if state.active != old:
        changed(state)


@contextmanager
def active(model: nn.Module, choice: Choice) -> Iterator[None]:
    """`with ll.active(model, "a"):` acts like `activate` inside the block and restores the selection afterwards, after
    exceptions too."""
    state = state_of(model)
    with scope(state):
        state.active, state.rows = _resolve(state, choice), None
        yield


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """`with ll.rows(model, ["a", None, "b"]):` one adapter per batch row; None is the bare base. Beam search may repeat
    rows.

    Raises:
        StateError: an unknown name or a merged model.
        SelectionError: a batch that does not fit, or a second thread.
    """
    state = state_of(model)
    if not isinstance(names, (list, tuple)) or not names:
        raise SelectionError("ll.rows takes a list with one adapter name or None per batch row.")
    for name in dict.fromkeys(names):
        if name is not None:
            _known(state, name)
    not_merged(state, "choosing adapters")
    with scope(state):
        state.rows = tuple(names)
        state.row_epoch += 1
        yield


def _resolve(state: ModelState, choice: Choice) -> tuple[tuple[str, float], ...]:
    if choice is None:
        weights: dict[str, float] = {}
    elif isinstance(choice, str):
        weights = {choice: 1.0}
    elif isinstance(choice, Mapping):
        weights = {name: float(w) for name, w in choice.items()}
    elif isinstance(choice, Iterable):
        weights = dict.fromkeys(choice, 1.0)
    else:
        raise SelectionError(f"adapters are chosen by a name, names, {{name: weight}} or None; got {choice!r}.")
    for name, w in weights.items():
        _known(state, name)
        if not math.isfinite(w):
            raise SelectionError(f"the weight of adapter {name!r} must be finite, got {w}.")
    not_merged(state, "choosing adapters")
    return tuple((name, weights[name]) for name in state.records if name in weights)


def _known(state: ModelState, name: object) -> None:
    if not isinstance(name, str):
        raise SelectionError(f"adapters are chosen by their names, strings; got {name!r} of {type(name).__name__}.")
    if name not in state.records:
        raise StateError(
            f"no adapter is called {name!r}.{did_you_mean(name, state.records)} Attached: {list(state.records)}."
        )


@contextmanager
def context(model: nn.Module, **values: Sequence[Any] | Tensor) -> Iterator[None]:
    """`with ll.context(model, task_ids=[0, 2]):` what a method reads of each row, one entry per batch row.

    Pages read it as `layer.context("task_ids")`, for the rows that they see. A batch k times as long repeats each row k
    times (beam search). A block inside another adds to it.

    Raises:
        SelectionError: a value without one entry per row; in a call, a batch that it does not fit.
    """
    state = state_of(model)
    found = {name: torch.as_tensor(value) for name, value in values.items()}
    bad = next((name for name, t in found.items() if t.dim() == 0 or not len(t)), None)
    if bad is not None:
        raise SelectionError(f"ll.context takes one entry per batch row, as in {bad}=[0, 2]; got {values[bad]!r}.")
    saved = state.context
    state.context = {**saved, **found}
    try:
        yield
    finally:
        state.context = saved


@contextmanager
def prompt(model: nn.Module, lengths: Sequence[int] | Tensor | None) -> Iterator[None]:
    """`with ll.prompt(model, [7, 4]):` the first 7 and 4 tokens of the rows are their prompts, padding not counted.
    None: every token is.

    Methods at block sites that edit prompt positions or generated ones read it. Without it, labels tell the prompt
    (their leading -100s), or it is all that a call without labels and without cached tokens brings, as in the first
    call of `generate`. A batch k times as long repeats each row k times (beam search).

    Raises:
        SelectionError: lengths that are no list of whole numbers; in a call, a batch that they do not fit.
    """
    state = state_of(model)
    if lengths is not None:
        try:
            found = lengths.detach().cpu() if isinstance(lengths, Tensor) else torch.as_tensor(list(lengths))
        except (TypeError, ValueError):
            found = torch.empty(0)
        if found.dim() != 1 or not len(found) or found.is_floating_point() or int(found.min()) < 0:
            raise SelectionError(
                f"ll.prompt takes one whole number per batch row, the length of its prompt, or None; got {lengths!r}."
            )
        lengths = found.long()
    saved = state.prompt
    state.prompt = Prompt(lengths)
    try:
        yield
    finally:
        state.prompt = saved
