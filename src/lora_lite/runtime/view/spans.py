"""Token positions as a page sees them: spans of a hidden state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.errors import SelectionError
from ..model.call import Call


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
