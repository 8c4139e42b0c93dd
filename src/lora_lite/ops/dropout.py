"""Dropout whose dropped copy of x is not kept for the backward pass: a mask of one byte per entry says all that is
needed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import own_products


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return (x * mask).mul_(scale)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (g * ctx.saved_tensors[0]).mul(ctx.scale), None, None


class _ShrinkDropped(torch.autograd.Function):
    """d Aᵀ for the dropped d = scale·(x ∘ mask), which is made again for A's gradient."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, A: Tensor, x: Tensor, mask: Tensor, scale: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(A, x, mask)
        ctx.scale = scale
        return (A @ d.reshape(-1, d.shape[-1]).mT).mT

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        A, x, mask = ctx.saved_tensors
        at_d = at_A = None
        if ctx.needs_input_grad[0]:
            at_d = (g @ A).view(x.shape)
        if ctx.needs_input_grad[1]:
            d = (x * mask).mul(ctx.scale)
            at_A = g.mT @ d.reshape(-1, d.shape[-1])
        return at_d, at_A, None, None, None


def dropout(x: Tensor, p: float) -> Tensor:
    """scale·(x ∘ mask), mask ~ Bernoulli(1 − p) per entry, scale = 1/(1 − p), 0 <= p < 1. `shrink_dropped` knows where
    it comes from."""
    if not own_products(x):
        return F.dropout(x, p, True)
    mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
    out: Any = _Drop.apply(x, mask, 1 / (1 - p))
    out.dropped_from = x.detach(), mask, 1 / (1 - p)
    return out


def shrink_dropped(d: Tensor, A: Tensor) -> Tensor | None:
    """d Aᵀ, (tokens, r), for what `dropout` returned: keeps x, which layers share, instead of d. None for any other
    tensor."""
    source = getattr(d, "dropped_from", None)
    if source is None or not own_products(d):
        return None
    return _ShrinkDropped.apply(d, A, *source)  # pyright: ignore[reportReturnType]
