"""Frozen bases that are scaled from two sides, without a scaled copy that waits for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autograd import own_products


def scaled_bases(A: Tensor, scales: Tensor, gains: Tensor) -> Tensor:
    """S[k, i, j] = λ[k, i] A[k, j] γ[i, j], (r, n, m), from A (r, m), which is frozen, λ (r, n) and γ (n, m).

    ∂λ[k, i] = Σ_j G[k, i, j] A[k, j] γ[i, j], ∂γ[i, j] = Σ_k G[k, i, j] A[k, j] λ[k, i]: the factors are all that is
    kept, where autograd would keep λ A and S too, each the size of a weight.
    """
    if A.requires_grad or not own_products(gains):
        return _scaled(A, scales, gains)
    return _ScaledBases.apply(A, scales, gains)  # pyright: ignore[reportReturnType]


def _scaled(A: Tensor, scales: Tensor, gains: Tensor) -> Tensor:
    return (scales[..., None] * A[:, None]) * gains


class _ScaledBases(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, scales: Tensor, gains: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(A, scales, gains)
        return _scaled(A, scales, gains)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (A, scales, gains), needed = ctx.saved_tensors, ctx.needs_input_grad
        GA = G * A[:, None]
        at_scales = torch.einsum("kij,ij->ki", GA, gains) if needed[1] else None
        at_gains = torch.einsum("kij,ki->ij", GA, scales) if needed[2] else None
        return None, at_scales, at_gains
