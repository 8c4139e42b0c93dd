"""Token positions as a page sees them: spans of a hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.errors import SelectionError


class Call:
    """The positions in one call of the model, for every wording that an acting adapter uses.

    `found[text]` is (index, keep, p): index (B, p + s) columns of prompt tokens and keep which of them are there; or
    index None and keep (B, T) the chosen columns; or both None: every column. An empty tuple: none.
    """

    def __init__(self, shape: tuple[int, int], found: dict[str, tuple[Any, ...]]) -> None:
        self.shape, self.found = shape, found

    def __eq__(self, other: object) -> bool:
        """By value, so that gradient checkpointing can tell two calls apart."""
        if not isinstance(other, Call) or self.shape != other.shape or self.found.keys() != other.found.keys():
            return self is other
        return all(_same(found, other.found[text]) for text, found in self.found.items())

    __hash__ = None  # type: ignore[assignment]


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Two entries of `Call.found`, by value."""
    if len(a) != len(b):
        return False
    for u, v in zip(a, b, strict=True):
        tensors = isinstance(u, Tensor) and isinstance(v, Tensor)
        if not (torch.equal(u, v) if tensors else u is v or u == v):
            return False
    return True


class Span:
    """Some token positions of (B, T, d): `take` gathers them, `add` adds a change at them and nowhere else."""

    def __init__(self, index: Tensor | None, keep: Tensor | None) -> None:
        self.index, self.keep = index, keep

    def take(self, h: Tensor) -> Tensor:
        """(B, k, d) at k positions per row; h itself where the span is not a list of positions."""
        return h if self.index is None else h.gather(1, self.index[..., None].expand(-1, -1, h.shape[-1]))

    def add(self, h: Tensor, change: Tensor) -> Tensor:
        """h + change at the span's positions; change (B, k, d) belongs to `take(h)`, or broadcasts against it."""
        if self.keep is None:
            return h + change.to(h.dtype)
        change = torch.where(self.keep[..., None], change.to(h.dtype), 0)
        if self.index is None:
            return h + change
        # a position that is not there adds a zero to the row's nearest column
        return h.scatter_add(1, self.index[..., None].expand_as(change), change)


def spans(
    call: Call | None, text: str, shape: Sequence[int], rows: Tensor | None, split: bool, path: str
) -> list[Span]:
    """The spans of one wording on a layer whose output has this shape; `split` keeps first and last tokens apart."""
    if text == "all":
        return [Span(None, None)]
    if call is None:
        raise SelectionError(
            f"{path}: positions={text!r} needs a call of the whole model that carries the adapters, not of a part of "
            "it. Call that model, or use positions='all'."
        )
    if tuple(shape[:2]) != (call.shape if rows is None else (len(rows), call.shape[1])):
        raise SelectionError(
            f"{path}: positions={text!r} was found for a batch of shape {call.shape}, but the hidden state has shape "
            f"{tuple(shape)}. The model adds, drops or flattens tokens on the way; use positions='all'."
        )
    found = call.found[text]
    if not found:
        return []
    index, keep, p = found
    if rows is not None:
        index, keep = (t if t is None else t.index_select(0, rows) for t in (index, keep))
    if index is None or keep is None or not split or p in (0, index.shape[1]):
        return [Span(index, keep)]
    return [Span(index[:, :p], keep[:, :p]), Span(index[:, p:], keep[:, p:])]
