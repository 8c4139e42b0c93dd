"""Dropout whose dropped copy of x is not kept for the backward pass: a mask of one byte per entry says all that is
needed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import own_backward, own_products


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return _dropped(x, mask, scale)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return g * ctx.saved_tensors[0].view(torch.uint8).to(g.dtype) * ctx.scale, None, None


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
            d = x * mask.view(torch.uint8).to(x.dtype) * ctx.scale
            at_A = g.mT @ d.reshape(-1, d.shape[-1])
        return at_d, at_A, None, None, None


def dropout(x: Tensor, p: float) -> Tensor:
    """scale·(x ∘ mask), mask ~ Bernoulli(1 − p) per entry, scale = 1/(1 − p), 0 <= p < 1. `shrink_dropped` knows where
    it comes from. `keep_mask` draws the mask."""
    trains = own_products(x)
    if not trains and (torch.is_grad_enabled() or not own_backward()):
        return F.dropout(x, p, True)
    mask = keep_mask(x, p)
    if not trains:
        return _dropped(x, mask, 1 / (1 - p))
    out: Any = _Drop.apply(x, mask, 1 / (1 - p))
    out.dropped_from = x.detach(), mask, 1 / (1 - p)
    return out


COARSE = 1 / 32
"""Nearer to 0 or 1 than this, p takes 16 bits of an entry."""
BYTES = torch.uint8, 256, 0, 8
WORDS = torch.int16, 65536, -32768, 4
"""What an entry takes of a draw: dtype, number of values, the least of them, entries in a draw."""
DRAWS = ("cpu", "cuda", "meta")
"""Devices that are known to draw whole 64-bit integers."""


def keep_mask(x: Tensor, p: float) -> Tensor:
    """True with probability 1 − p, in x's shape, from one 64-bit draw for eight entries.

    An entry is dropped when its byte lies below t = ⌊256 p + u⌋. One u ~ U(0, 1) serves the whole mask, so that every
    entry is dropped with probability p exactly, and t/256, the share of one mask, is p to within 1/256 (1/65536 for p
    near 0 or 1).
    """
    if x.device.type not in DRAWS:
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
    lane, steps, least, per_draw = BYTES if COARSE <= p <= 1 - COARSE else WORDS
    draws = torch.empty(-(-x.numel() // per_draw), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    t = (torch.rand((), device=x.device) + p * steps).floor() + least
    return (draws.view(lane)[: x.numel()] >= t).view(x.shape)


def _dropped(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """scale·(x ∘ mask), in the order in which a processor does it fastest."""
    return mask.view(torch.uint8).to(x.dtype).mul_(x).mul_(scale)


def shrink_dropped(d: Tensor, A: Tensor) -> Tensor | None:
    """d Aᵀ, (tokens, r), for what `dropout` returned: keeps x, which layers share, instead of d. None for any other
    tensor."""
    source = getattr(d, "dropped_from", None)
    if source is None or not own_products(d):
        return None
    return _ShrinkDropped.apply(d, A, *source)  # pyright: ignore[reportReturnType]
