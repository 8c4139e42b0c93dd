"""Which adapters act: `activate`, and the scopes `active` and `rows`. Plain state of the model, so that compilers see
it change; a call keeps to what it began with."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.arguments import checked
from ..core.config import matches
from ..core.errors import SelectionError, StateError, did_you_mean, listing, shown
from .call.recompute import changed
from .call.scope import scope
from .model.call import Prompt, Rows, Said
from .model.state import ModelState, not_merged, outside_calls, state_of, unwrap
from .model.undo import Undo, all_or_nothing, surely

Choice = str | Sequence[str] | Mapping[str, float] | None
Owners = Sequence[int] | Tensor | Mapping[str, Sequence[int] | Tensor]


@checked
def activate(model: nn.Module, choice: Choice) -> None:
    """Choose the adapters that act from now on: a name, several names, {name: weight}, or None for the bare base.

    Several act in attach order. Weight w of an adapter f means y + w (f(x, y) - y).

    Raises:
        StateError: an unknown name or a merged model.
        SelectionError: inside a scope, or while another thread runs a call of the model.
    """
    model, state = unwrap(model), state_of(model)
    outside_calls(model, "ll.activate")
    chosen, old = _resolve(state, choice), state.active

    def steps(undo: Undo) -> None:
        undo(lambda: state.select(old))
        state.select(chosen)
        if chosen != old:
            changed(state)

    all_or_nothing(steps)


@checked
@contextmanager
def active(model: nn.Module, choice: Choice) -> Iterator[None]:
    """`with ll.active(model, "a"):` acts like `activate` inside the block and restores the selection afterwards, after
    exceptions too.

    Raises:
        StateError: an unknown name or a merged model.
        SelectionError: another thread is inside such a block, or runs a call of the model.
    """
    chosen = _resolve(state_of(model), choice)
    with scope(model, "ll.active") as state:
        state.select(chosen)
        yield


@checked
@contextmanager
def rows(model: nn.Module, names: Sequence[str | None], owners: Owners | None = None) -> Iterator[None]:
    """`with ll.rows(model, ["a", None, "b"]):` one adapter per batch row; None is the bare base. Beam search may repeat
    rows.

    Args:
        names: one per row of the batch with which the whole model is called.
        owners: for layers that see another batch than that (images, windows): the number of the row to which each
            element of it belongs. A list for all inner batches of its length, or {pattern of targets: list}, which goes
            first; patterns as in `target_names`.

    Raises:
        StateError: an unknown name or a merged model.
        SelectionError: owners that are no rows; another thread is inside such a block, or runs a call of the model. In
            a call: a layer of whose input it cannot be told which rows it holds.
    """
    state = state_of(model)
    if not isinstance(names, (list, tuple)) or not names:
        raise SelectionError("ll.rows takes a list with one adapter name or None per batch row.")
    for name in dict.fromkeys(names):
        if name is not None:
            _known(state, name)
    not_merged(state, "choosing adapters")
    chosen = _with_owners(state, tuple(names), owners)
    with scope(model, "ll.rows"):
        state.select(state.active, chosen)
        state.row_epoch += chosen != state.last_rows  # a generation may open a block for each token
        state.row_block, state.last_rows = state.row_block + 1, chosen
        yield


def _with_owners(state: ModelState, names: tuple[str | None, ...], owners: Owners | None) -> Rows:
    if not isinstance(owners, Mapping):
        return Rows(names, _adapters_of(names, owners) if owners is not None else ())
    paths = list(dict.fromkeys(path for record in state.records.values() for path in record.targets))
    at: dict[str, tuple[str | None, ...]] = {}
    for pattern, own in owners.items():
        try:
            hit, adapters = [path for path in paths if matches(pattern, path)], _adapters_of(names, own)
        except re.error as e:
            raise SelectionError(f"ll.rows(owners=...): {pattern!r} is no pattern ({e}).") from None
        if not hit:
            raise SelectionError(
                f"ll.rows(owners=...): no target is called {pattern!r}.{did_you_mean(pattern, paths)} Targets: "
                f"{listing(paths)}."
            )
        at |= {path: adapters for path in hit if path not in at}
    return Rows(names, at=tuple(at.items()))


def _adapters_of(names: tuple[str | None, ...], owners: Sequence[int] | Tensor) -> tuple[str | None, ...]:
    """The adapter of each element of an inner batch."""
    given: Any = owners.tolist() if isinstance(owners, Tensor) else owners
    numbers: list[Any] = list(given) if isinstance(given, Iterable) else []
    if not numbers or not all(type(i) is int and 0 <= i < len(names) for i in numbers):
        raise SelectionError(
            f"ll.rows(owners=...) takes, for each element of an inner batch, the number of its row, 0 to "
            f"{len(names) - 1}; got {shown(given)}."
        )
    return tuple(names[i] for i in numbers)


def _resolve(state: ModelState, choice: Choice) -> tuple[tuple[str, float], ...]:
    if choice is None:
        weights: dict[str, float] = {}
    elif isinstance(choice, str):
        weights = {choice: 1.0}
    elif isinstance(choice, Mapping):
        weights = {name: _weight(name, w) for name, w in choice.items()}
    elif isinstance(choice, Iterable):
        weights = dict.fromkeys(choice, 1.0)
    else:
        raise SelectionError(f"adapters are chosen by a name, names, {{name: weight}} or None; got {choice!r}.")
    for name in weights:
        _known(state, name)
    not_merged(state, "choosing adapters")
    if len(weights) < 2:
        return tuple(weights.items())
    return tuple((name, weights[name]) for name in state.records if name in weights)


def _weight(name: object, value: Any) -> float:
    """The weight of an adapter, a finite number."""
    try:
        fine = math.isfinite(value)
    except (TypeError, OverflowError):
        fine = False
    if not fine:
        raise SelectionError(f"the weight of adapter {name!r} must be a finite number, got {shown(value)}.")
    return float(value)


def _known(state: ModelState, name: object) -> None:
    if not isinstance(name, str):
        raise SelectionError(f"adapters are chosen by their names, strings; got {name!r} of {type(name).__name__}.")
    if name not in state.records:
        raise StateError(
            f"no adapter is called {name!r}.{did_you_mean(name, state.records)} Attached: {list(state.records)}."
        )


@checked
@contextmanager
def context(model: nn.Module, **values: Sequence[Any] | Tensor) -> Iterator[None]:
    """`with ll.context(model, task_ids=[0, 2]):` what a method reads of each row, one entry per batch row.

    Pages read it as `layer.context("task_ids")`, for the rows that they see. A batch k times as long repeats each row k
    times (beam search). A block inside another adds to it. It holds for the calls of this thread, and for those of
    threads that open no block themselves.

    Raises:
        SelectionError: a value without one entry per row; in a call, a batch that it does not fit.
    """
    state = state_of(model)
    found = {name: torch.as_tensor(value) for name, value in values.items()}
    bad = next((name for name, t in found.items() if t.dim() == 0 or not len(t)), None)
    if bad is not None:
        raise SelectionError(f"ll.context takes one entry per batch row, as in {bad}=[0, 2]; got {values[bad]!r}.")
    said = state.here.now.said or Said()
    with _saying(state, Said(said.prompt, {**said.context, **found})):
        yield


@checked
@contextmanager
def prompt(model: nn.Module, lengths: Sequence[int] | Tensor | None) -> Iterator[None]:
    """`with ll.prompt(model, [7, 4]):` the first 7 and 4 tokens of the rows are their prompts, padding not counted.
    None: every token is.

    Methods at block sites that edit prompt positions or generated ones read it. Without it, labels tell the prompt
    (their leading -100s), or it is all that a call without labels and without cached tokens brings, as in the first
    call of `generate`. A batch k times as long repeats each row k times (beam search).

    It holds for the calls of this thread, and for those of threads that open no block themselves.

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
    said = state.here.now.said or Said()
    with _saying(state, Said(Prompt(lengths), said.context)):
        yield


@contextmanager
def _saying(state: ModelState, said: Said) -> Iterator[None]:
    """This thread's blocks say so inside."""
    me, now = threading.get_ident(), state.here.now
    saved = now.said

    def restore() -> None:
        now.said = saved
        if saved is None:
            state.said.pop(me, None)
        else:
            state.said[me] = saved

    with surely(restore):
        now.said = state.said[me] = said
        yield
