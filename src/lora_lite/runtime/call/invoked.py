"""Positions from the last occurrence of some tokens on: what a row's answer to an invocation is, also over the steps of
cached generation."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...core.errors import SelectionError
from ..model.call import Begun
from ..model.state import ModelState
from ..view.cache import cache_of


def since(
    tokens: Tensor, wanted: tuple[int, ...], past: Any, cache: Any, last: Begun | None, who: str
) -> tuple[Tensor, Begun | None]:
    """(keep (B, T): True from the last occurrence on, what the next call of the same cache must know).

    A row without an occurrence has none of these positions; where the call continues a cache, all, if one came before.
    Of an occurrence that begins in the cache the rest counts.

    Raises:
        SelectionError: the call has no token ids, or a row has no occurrence and continues a cache of which no earlier
            call was seen.
    """
    if tokens.dim() != 2 or tokens.is_floating_point():
        raise SelectionError(
            f"{who}: the tokens are looked for in input_ids (batch, tokens); call the model with them."
        )
    B, T = tokens.shape
    compiling, first = torch.compiler.is_compiling(), isinstance(past, int) and past == 0
    known = None if first else _continued(last, past, cache, B)
    tail = tokens[:, :0] if known is None else known.tail.to(tokens.device)
    both = torch.cat((tail, tokens), 1)
    start = _last_start(both, wanted) - tail.shape[1]  # T where there is none
    rows = start < T
    if not first and known is None and (compiling or not bool(rows.all())):
        raise SelectionError(
            f"{who}: the call continues a cache of {past} tokens of which no earlier call was seen, so whether the "
            "tokens were among them cannot be told. Run the prompt through this model with the adapter active, or "
            "let the new tokens begin with them."
        )
    keep = torch.arange(T, device=tokens.device) >= start[:, None]
    if known is not None:
        before = known.rows.to(tokens.device)
        keep, rows = keep | (before & ~rows)[:, None], rows | before
    if compiling or not isinstance(past, int):
        return keep, None
    tail = both[:, max(0, both.shape[1] - len(wanted) + 1) :]
    known_later = cache is not None and not isinstance(cache, (tuple, list))
    return keep, Begun(weakref.ref(cache) if known_later else None, past + T, rows, tail)


def _continued(last: Begun | None, past: Any, cache: Any, B: int) -> Begun | None:
    """What is known of the calls that filled the cache, for each row of this call."""
    if last is None or last.columns != past or last.cache is None or last.cache() is not cache or B % len(last.rows):
        return None
    n = B // len(last.rows)
    return replace(last, rows=last.rows.repeat_interleave(n), tail=last.tail.repeat_interleave(n, 0))


def note_cache(state: ModelState, begun: dict[str, Begun], output: Any) -> None:
    """Remember what a call leaves for those that continue its cache, which it may have made by itself; forget what no
    later call can continue."""
    made = cache_of(output) if isinstance(output, Mapping) else None
    for key in [key for key, one in list(state.begun.items()) if one.cache is None or one.cache() is None]:
        state.begun.pop(key, None)
    for text, one in begun.items():
        if one.cache is None and made is not None and not isinstance(made, (tuple, list)):
            one = replace(one, cache=weakref.ref(made))
        cache = None if one.cache is None else one.cache()
        if cache is not None:
            state.begun[text, id(cache)] = one


def _last_start(tokens: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """(B,) column at which the last occurrence begins; T where there is none."""
    B, T = tokens.shape
    k = len(wanted)
    if k > T:
        return torch.full((B,), T, device=tokens.device)
    found = (tokens.unfold(1, k, 1) == torch.tensor(wanted, device=tokens.device)).all(-1)
    column = torch.arange(T - k + 1, device=tokens.device)
    last = torch.where(found, column, -1).amax(1)
    return torch.where(last < 0, T, last)
