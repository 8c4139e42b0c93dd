"""Orthogonal maps near the identity, each as R − I, so that a zero parameter gives an exact zero and small ones lose nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def skew(theta: Tensor, n: int) -> Tensor:
    """The skew-symmetric (..., n, n) whose upper triangle, row by row, is theta (..., n(n−1)/2)."""
    rows, cols = torch.triu_indices(n, n, 1, device=theta.device).unbind()
    upper = theta.new_zeros(*theta.shape[:-1], n * n).index_copy(-1, rows * n + cols, theta)
    upper = upper.unflatten(-1, (n, n))
    return upper - upper.mT


class _Cayley(torch.autograd.Function):
    """With D = 2(I−Q)⁻¹Q we have (I−Q)⁻¹ = I + D/2, so dD = ½ (2I+D) dQ (2I+D): the backward pass needs two products and no solve."""

    @staticmethod
    def forward(Q: Tensor) -> Tensor:
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        return torch.linalg.solve(eye - Q, 2 * Q)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (D,) = ctx.saved_tensors
        half = 0.5 * D.mT + torch.eye(D.shape[-1], dtype=D.dtype, device=D.device)
        return 2 * half @ g @ half


def cayley_minus_identity(Q: Tensor) -> Tensor:
    """R − I = 2(I−Q)⁻¹Q for the rotation R = (I+Q)(I−Q)⁻¹ of a skew-symmetric Q (..., n, n); orthogonal to rounding for any Q."""
    return _Cayley.apply(Q)  # pyright: ignore[reportReturnType]


def neumann_minus_identity(Q: Tensor, terms: int) -> Tensor:
    """R − I ≈ 2(Q + … + Q^(k−2)) + Q^(k−1), the truncated series of k >= 3 terms; orthogonal only for small Q."""
    D = Q + 2 * torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    for _ in range(terms - 3):
        D = Q @ D + 2 * torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return Q @ D


def add_blocks(x: Tensor, D: Tensor) -> Tensor:
    """x (I + blockdiag(D_1 … D_n)) for x (..., n b) and D (n, b, b)."""
    n, b, _ = D.shape
    blocks = x.reshape(-1, n, b).transpose(0, 1)
    return torch.baddbmm(blocks, blocks, D).transpose(0, 1).reshape(x.shape)
