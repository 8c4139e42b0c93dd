"""A matrix with its adapters as one matrix, block by block, without a product of the base with the identity: that is
the base itself.

F(x) = outputs(inputs(x)): W' takes a block of W's rows through the pages' factors, or a block of its columns through
the pages of the output, which see rows of the identity; then the rows of that go back through the pages of the input,
x ↦ x M, whose transpose is what a backward pass computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..model.kind import Cell, Part
from .composed import Composed

SMALL = 1 << 17
"""Numbers of W in a block: small enough for a processor's cache,"""
LARGE = 1 << 20
"""and large enough for pages, which are called for each."""


def folded(f: Composed, cell: Cell, w: Tensor, dtype: torch.dtype) -> Iterator[tuple[Part, Tensor, Tensor]]:
    """(where, what W' (d_out, d_in) has there, W' − W there) until all of W was there, in `dtype`.

    Without gradients. The blocks are the caller's until the next ones come. A matrix in `dtype` is kept only where
    pages rewrite inputs and outputs both.
    """
    with _still():
        turns, pair = _rewrites_input(f, cell, w, dtype), _factors(f, cell, w, dtype)
        n = 0 if turns or pair is not None else _rows_apart(f, w, dtype)
    if n:
        yield from _by_rows(f, w, dtype, n)
        return
    if pair is None and not turns:
        yield from _by_columns(f, cell, w, dtype)
        return
    middle = None
    if pair is None:
        middle = torch.empty(w.shape, dtype=dtype, device=w.device)
        for part, new, _ in _by_columns(f, cell, w, dtype):
            middle[part] = new
    n = min(w.shape[0], max(1, (LARGE if turns else SMALL) // w.shape[1]))
    room = torch.empty(2, n, w.shape[1], dtype=dtype, device=w.device)  # fresh memory costs more than the sums
    for start in range(0, w.shape[0], n):
        part = slice(start, start + n), slice(None)
        new, change = room[:, : w.shape[0] - start]
        with _still():
            if middle is not None:
                new = middle[part]
            elif pair is not None:
                torch.mm(pair[1][part[0]], pair[0], out=change)
                new.copy_(w[part]).add_(change)
            if turns:
                new = _transposed(f, new)
                torch.sub(new, w[part], out=change)
        yield part, new, change


def shift(f: Composed, cell: Cell, w: Tensor, dtype: torch.dtype) -> Tensor:
    """b' = F(0), (d_out,)."""
    with _still():
        x, y = cell.zero(_like(w, dtype)), w.new_zeros(1, w.shape[0], dtype=dtype)
        moved = f.inputs(x)
        if moved is not x and bool(moved.any()):
            y = f.product(moved)
        return f.outputs(moved, f.biased(y))[0]


def adapted_matrix(f: Composed, cell: Cell) -> Tensor:
    """W' at once and with gradients, W and b in one precision."""
    x = cell.units(0, f.w.shape[1], f.w)
    y = f(x) if f.rewrites_input else f.outputs(x, f.biased(f.w.mT))
    return (y - f(cell.zero(f.w))).mT


@contextmanager
def _still() -> Iterator[None]:
    """No gradients, and tensors that a backward pass may still keep."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _rewrites_input(f: Composed, cell: Cell, w: Tensor, dtype: torch.dtype) -> bool:
    """Whether a page does, tried on one row: some do so on one side of their choice."""
    if not f.rewrites_input:
        return False
    x = cell.units(0, 1, _like(w, dtype))
    return f.inputs(x) is not x


def _factors(f: Composed, cell: Cell, w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """The pages of the output as a product; one of rank 0 where they return what they are given."""
    x, y = cell.units(0, 1, _like(w, dtype)), w.new_ones(1, w.shape[0], dtype=dtype)
    if f.outputs(x, y) is y:
        return y.new_empty(0, w.shape[1]), y.new_empty(w.shape[0], 0)
    return f.factors()


def _like(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Says the shape, precision and device of W and holds one number."""
    return w.new_zeros((), dtype=dtype).expand(w.shape)


def _by_columns(f: Composed, cell: Cell, w: Tensor, dtype: torch.dtype) -> Iterator[tuple[Part, Tensor, Tensor]]:
    """The pages of the output on rows of the identity, for which the base gives columns of W."""
    like = _like(w, dtype)
    with _still():
        zero = like.new_zeros(w.shape[0])
        if cell.has_bias:
            zero = f.outputs(cell.zero(like), f.biased(zero[None]))[0]
    n = min(w.shape[1], max(1, LARGE // max(w.shape)))
    room = like.new_empty(n, w.shape[1])
    for start in range(0, w.shape[1], n):
        part = slice(None), slice(start, start + n)
        with _still():
            old = w[part].to(dtype)
            y = f.outputs(cell.units(start, n, like, room), f.biased(old.mT))
            new = (y - zero if bool(zero.any()) else y).mT
            change = new - old
        yield part, new, change


def _rows_apart(f: Composed, w: Tensor, dtype: torch.dtype) -> int:
    """How many rows of W the pages can be given apart from the rest, 0 where none: tried on one random column."""
    maps = f.feature_maps()
    if maps is None or w.stride(1) != 1:
        return 0
    column = torch.randn(w.shape[0], generator=torch.Generator().manual_seed(0), dtype=dtype).to(w.device)
    whole = maps(column[None], slice(None))[0]
    n = 1 << max(1, SMALL // w.shape[1]).bit_length() - 1
    while n < w.shape[0]:
        if torch.equal(torch.cat([maps(column[None, part], part)[0] for part in _parts(w, n)]), whole):
            return n
        n *= 2
    return 0


def _parts(w: Tensor, n: int) -> list[slice]:
    """Blocks of n rows of W."""
    return [slice(start, start + n) for start in range(0, w.shape[0], n)]


def _by_rows(f: Composed, w: Tensor, dtype: torch.dtype, n: int) -> Iterator[tuple[Part, Tensor, Tensor]]:
    """Pages that act on every feature by itself, or with its near ones: n rows of W go through them."""
    maps = f.feature_maps()
    assert maps is not None
    room = torch.empty(2, n, w.shape[1], dtype=dtype, device=w.device)
    for rows in _parts(w, n):
        old, change = room[:, : w.shape[0] - rows.start]
        with _still():
            old.copy_(w[rows])
            zero = maps(old.new_zeros(1, old.shape[0]), rows)
            new = maps(old.mT, rows)
            new = (new - zero if bool(zero.any()) else new).mT
            torch.sub(new, old, out=change)
        yield (rows, slice(None)), new, change


def _transposed(f: Composed, rows: Tensor) -> Tensor:
    """rows Mᵀ (n, d_in) for the pages of the input x ↦ x M + c."""
    with torch.enable_grad():
        x = torch.zeros_like(rows).requires_grad_()
        y = f.inputs(x)
    return torch.autograd.grad(y, x, rows)[0]
