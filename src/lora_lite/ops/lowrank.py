"""Low-rank updates of a layer's output without a dense temporary.

The thin products are laid out for both passes: CPU libraries multiply matrices with few columns several times slower
than their transposes with few rows, most of all in the backward pass, where autograd picks the layout of a gradient by
that of the factor. A GPU takes both alike. There, and for few numbers, what counts is how many operations the host
starts, and how many of them Python sees: see `few`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import own_backward, own_products
from .dropout import shrink_dropped

FEW = 2**14
"""Numbers up to which a product on the CPU takes less time than what surrounds it (measured at widths of 64 to 2,048,
where both forms cost the same)."""


def few(t: Tensor) -> bool:
    """Whether torch's own products and their backward passes are the quickest for this input or output. A compiler,
    to which the answer would be a guard on the shape, is told no."""
    if t.is_cuda:
        return True
    return own_backward() and t.dtype.itemsize > 2 and t.numel() <= FEW  # 16 bits: see `_wide`


def shrink(x: Tensor, A: Tensor) -> Tensor:
    """x Aᵀ for x (..., d_in), A (r, d_in), as (tokens, r)."""
    if not isinstance(x, Tensor):  # one-hot rows of an embedding
        return (x @ A.mT).flatten(0, -2)
    dropped = shrink_dropped(x, A)
    if dropped is not None:
        return dropped
    rows = x.reshape(-1, x.shape[-1])  # of three dimensions, torch would choose its product by what needs a gradient
    return F.linear(rows, A) if few(x) else (A @ rows.mT).mT


class _AddLowrank(torch.autograd.Function):
    """Saves z for a B that is trained, and B, not the copy of it that a 16-bit product reads."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, B: Tensor, s: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, of_z, of_B, _ = ctx.needs_input_grad
        ctx.save_for_backward(z if of_B else None, B if of_z else None)
        ctx.s = s
        return torch.addmm(y, z, _wide(B), alpha=s)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (z, B), needed = ctx.saved_tensors, ctx.needs_input_grad
        at_z = (B.mT @ g.mT).mT * ctx.s if needed[1] else None
        at_B = (z.mT @ g).mT * ctx.s if needed[2] else None
        return g, at_z, at_B, None


def _wide(B: Tensor) -> Tensor:
    """Bᵀ (r, d_out) as the product reads it fastest: CPU libraries want 16-bit factors in rows, and take others either
    way."""
    return B.mT.contiguous() if B.dtype.itemsize == 2 and B.device.type == "cpu" else B.mT


def add_lowrank(y: Tensor, z: Tensor, B: Tensor, s: float = 1.0) -> Tensor:
    """y + s z Bᵀ in one fused pass. y (..., d_out), z (..., r) or (tokens, r), B (d_out, r)."""
    rows, z = y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])
    if few(y) or not own_products(z):
        return torch.addmm(rows, z, _wide(B), alpha=s).view(y.shape)
    return _AddLowrank.apply(rows, z, B, s).view(y.shape)  # pyright: ignore[reportAttributeAccessIssue]


def lowrank_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float = 1.0) -> Tensor:
    """y + s (x Aᵀ) Bᵀ. x (..., d_in), y (..., d_out), A (r, d_in), B (d_out, r)."""
    return add_lowrank(y, shrink(x, A), B, s)


def deviation_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, A0: Tensor, B0: Tensor, s: float) -> Tensor:
    """y + s ((B0+B)(A0+A) − B0A0) x, computed as s ((B0+B)(A x) + B (A0 x)) in two products of width 2r.

    y itself, bit for bit, while A = B = 0, and free of the cancellation between the two products. Shapes as in
    `lowrank_update`.
    """
    return lowrank_update(y, x, *deviation_factors(A, B, A0, B0), s)


def deviation_factors(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """(2r, d_in) and (d_out, 2r) whose product is (B0+B)(A0+A) − B0A0."""
    return torch.cat((A, A0)), torch.cat(((B0 + B).mT, B.mT)).mT


def row_norm_square_change(WA: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """‖row_j(W + sBA)‖² − ‖row_j W‖² = 2s ⟨B_j, (W Aᵀ + (s/2) B A Aᵀ)_j⟩, shape (d_out,), from WA = W Aᵀ (d_out, r)."""
    return 2 * s * (B * torch.addmm(WA, B, A @ A.mT, alpha=s / 2)).sum(-1)


def inverse_root_minus_one(e: Tensor) -> Tensor:
    """(1 + e)^−½ − 1 without cancellation, for e > −1 (values at or below −1, which only rounding makes, count as just
    above)."""
    return torch.expm1(-0.5 * torch.log1p(e.clamp_min(1e-6 - 1)))


class _Scale(torch.autograd.Function):
    """y + h (y − b) with a backward pass of one product per gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, b: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(y, h, b)  # with `setup_context`, torch would inspect this signature in every call
        return torch.addcmul(y, y if b is None else y - b, h)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, h, b = ctx.saved_tensors
        at_h = None
        if ctx.needs_input_grad[1]:
            at_h = (g * (y if b is None else y - b)).reshape(-1, h.shape[0]).sum(0)
        return torch.addcmul(g, g, h), at_h, None


class _Gate(torch.autograd.Function):
    """W + W ∘ M for a W that is not trained: a backward pass of one product, where torch multiplies W by 1 first."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, M: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(W)
        return torch.addcmul(W, W, M)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, g * ctx.saved_tensors[0]


def gated(W: Tensor, M: Tensor) -> Tensor:
    """W + W ∘ M, rounded once; 1 + M is never formed."""
    if W.requires_grad or not own_products(M):
        return torch.addcmul(W, W, M)
    return _Gate.apply(W, M)  # pyright: ignore[reportReturnType]


def scale_outputs(y: Tensor, h: Tensor, b: Tensor | None) -> Tensor:
    """y + h (y − b): the outputs W x scaled by 1 + h (d_out,), or (n, 1, d_out) with a gain per row; the bias b
    (frozen) is left alone. Rounds once; 1 + h is never formed."""
    if h.dim() > 1 or not (torch.is_grad_enabled() and own_backward()):
        return torch.addcmul(y, y if b is None else y - b, h)
    return _Scale.apply(y, h, b)  # pyright: ignore[reportReturnType]


def scaled_lowrank_update(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, h: Tensor, b: Tensor | None, s: float = 1.0
) -> Tensor:
    """y + h (y − b) + s (x Aᵀ) Bᵀ with one new tensor of y's size."""
    scaled = scale_outputs(y.reshape(-1, y.shape[-1]), h, b)
    add = scaled.addmm_ if own_backward() else scaled.addmm
    return add(shrink(x, A), _wide(B), alpha=s).view(y.shape)
