"""Products with a matrix that has few entries, without writing it out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import own_products

SAMPLED = 64
"""The gradient of the entries is computed entry by entry while they are fewer than one in this many, else as a dense
product of which the entries are picked."""


def _bag(x: Tensor, values: Tensor, rows: Tensor, columns: Tensor, d_out: int) -> Tensor:
    """(tokens, d_out): row i of S xᵀ is a weighted sum of rows of xᵀ, an embedding bag."""
    starts = torch.searchsorted(rows, torch.arange(d_out, device=rows.device))
    return F.embedding_bag(columns, x.mT.contiguous(), starts, mode="sum", per_sample_weights=values).mT


class _SparseProduct(torch.autograd.Function):
    """The input's gradient is another sparse product, where autograd would scatter row after row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, rows: Tensor, columns: Tensor, d_out: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, values, rows, columns)
        return _bag(x, values, rows, columns, d_out)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x, values, rows, columns), needed = ctx.saved_tensors, ctx.needs_input_grad
        at_x = at_values = None
        if needed[0]:
            order = columns.argsort()
            at_x = _bag(g, values[order], columns[order], rows[order], x.shape[-1])
        if needed[1] and SAMPLED * len(values) < g.shape[-1] * x.shape[-1]:
            at_values = (g.mT.contiguous()[rows] * x.mT.contiguous()[columns]).sum(-1)
        elif needed[1]:
            at_values = (g.mT @ x)[rows, columns]
        return at_x, at_values, None, None, None


def sparse_product(x: Tensor, values: Tensor, rows: Tensor, columns: Tensor, d_out: int) -> Tensor:
    """x Sᵀ for x (..., d_in) and S (d_out, d_in) with S[rows, columns] = values at distinct places and zeros elsewhere;
    rows ascend."""
    tokens = x.reshape(-1, x.shape[-1]).to(values.dtype)
    product = _SparseProduct.apply if own_products(values) else _bag
    out: Any = product(tokens, values, rows, columns, d_out)
    return out.reshape(*x.shape[:-1], d_out)
