"""Low-rank updates of a layer's output without a dense temporary."""

from __future__ import annotations

import torch
from torch import Tensor


def add_lowrank(y: Tensor, z: Tensor, B: Tensor) -> Tensor:
    """y + z Bᵀ in one fused pass. y (..., d_out), z (..., r), B (d_out, r)."""
    if y.dim() == 2:
        return torch.addmm(y, z, B.mT)
    return torch.addmm(y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1]), B.mT).view(y.shape)


def deviation(x: Tensor, A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> Tensor:
    """(BA − B0A0) x for A = A0 + ΔA, B = B0 + ΔB, given ΔA, ΔB in place of A, B: B(ΔA x) + ΔB(A0 x).

    Exactly zero while ΔA = ΔB = 0, and free of the cancellation that BA − B0A0 suffers. x (..., d_in), A (r, d_in), B (d_out, r).
    """
    zA, z0 = x @ A.mT, x @ A0.mT
    return torch.cat((zA, z0), -1) @ torch.cat((B0 + B, B), -1).mT


def row_norm_square_change(WA: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """‖row_j(W + sBA)‖² − ‖row_j W‖² = 2s Σ_k B_jk (W Aᵀ)_jk + s² (B (A Aᵀ) ∘ B) 1, shape (d_out,), from WA = W Aᵀ (d_out, r)."""
    return 2 * s * (B * WA).sum(-1) + s * s * ((B @ (A @ A.mT)) * B).sum(-1)


def inverse_root_minus_one(e: Tensor) -> Tensor:
    """(1 + e)^−½ − 1 without cancellation, for e > −1 (values at or below −1, which only rounding makes, count as just above)."""
    root = (1 + e).clamp_min(1e-6).sqrt()
    return -e / (root * (1 + root))


def scale_outputs(y: Tensor, h: Tensor, b: Tensor | None) -> Tensor:
    """y + h (y − b): the outputs W x scaled by 1 + h (d_out,), the bias left alone. Rounds once, and 1 + h is never formed."""
    return torch.addcmul(y, y if b is None else y - b, h)
