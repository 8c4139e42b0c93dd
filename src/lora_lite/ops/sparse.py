"""Products with a matrix that has few entries, without writing it out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch import sampled_products
from .autograd import own_products

SAMPLED = 10
"""The gradient of the entries is computed entry by entry while they are fewer than one in this many, else as a dense
product of which the entries are picked."""
ENTRIES = ("cpu", "cuda", "meta")
"""Where torch can do the former."""


def _bag(xT: Tensor, values: Tensor, rows: Tensor, columns: Tensor, d_out: int) -> Tensor:
    """x Sᵀ (tokens, d_out) from xᵀ in one piece: row i of S xᵀ is a weighted sum of rows of xᵀ, an embedding bag. Laid
    out anew, since whatever follows would read a transposed matrix more slowly than this copies it."""
    starts = torch.searchsorted(rows, torch.arange(d_out, dtype=rows.dtype, device=rows.device))
    starts = starts.to(columns.dtype)
    return F.embedding_bag(columns, xT, starts, mode="sum", per_sample_weights=values).mT.contiguous()


class _SparseProduct(torch.autograd.Function):
    """The input's gradient is another sparse product, where autograd would scatter row after row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, rows: Tensor, columns: Tensor, d_out: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, values, rows, columns)
        return _bag(x.mT.contiguous(), values, rows, columns, d_out)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x, values, rows, columns), needed = ctx.saved_tensors, ctx.needs_input_grad
        at_x = at_values = None
        gT = g.mT.contiguous()
        if needed[0]:
            order = columns.argsort()
            at_x = _bag(gT, values[order], columns[order], rows[order], x.shape[-1])
        few = SAMPLED * len(values) < g.shape[-1] * x.shape[-1] and x.device.type in ENTRIES
        if needed[1] and few and not torch.is_grad_enabled():  # a second derivative needs a product that has one
            at_values = sampled_products(gT, x.mT.contiguous(), rows, columns)
        elif needed[1]:
            at_values = (gT @ x)[rows.long(), columns.long()]
        return at_x, at_values, None, None, None


def sparse_product(x: Tensor, values: Tensor, rows: Tensor, columns: Tensor, d_out: int) -> Tensor:
    """x Sᵀ for x (..., d_in) and S (d_out, d_in) with S[rows, columns] = values at distinct places and zeros elsewhere;
    rows ascend."""
    tokens = x.reshape(-1, x.shape[-1]).to(values.dtype)
    if own_products(values):
        out: Any = _SparseProduct.apply(tokens, values, rows, columns, d_out)
    else:
        out = _bag(tokens.mT.contiguous(), values, rows, columns, d_out)
    return out.view(*x.shape[:-1], d_out)
