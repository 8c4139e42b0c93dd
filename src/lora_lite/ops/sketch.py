"""A product that keeps a sketch of its input for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped(x: Tensor, n: int) -> Tensor:
    """(tokens, n, ⌈d/n⌉): the features of x (..., d) in n groups, the last one filled up with zeros."""
    width = -(-x.shape[-1] // n)
    return F.pad(x, (0, n * width - x.shape[-1])).reshape(-1, n, width)


class _Sketched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, n: int, scale: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        groups = grouped(x, n)
        v = F.normalize(groups.mean((0, 1)), dim=0)
        ctx.save_for_backward(groups @ v, v, A)
        ctx.scale = scale
        return x @ A.mT

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        kept, v, A = ctx.saved_tensors
        at_x = g @ A if ctx.needs_input_grad[0] else None
        sketch = (kept[..., None] * v).flatten(1)[:, : A.shape[1]] * ctx.scale
        return at_x, g.reshape(-1, g.shape[-1]).mT @ sketch, None, None


def sketched_product(x: Tensor, A: Tensor, n: int, scale: float) -> Tensor:
    """x Aᵀ for x (..., d) and A (r, d), whose gradient at A sees scale · (x_g·v) v in place of each of n groups x_g of
    features, v the mean of all groups, normalised. One number per token and group is kept."""
    out: Any = _Sketched.apply(x, A, n, scale)
    return out
