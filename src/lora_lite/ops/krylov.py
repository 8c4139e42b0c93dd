"""The largest singular triplets of a matrix that is only multiplied with: a block Krylov space grown until they have
converged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

Product = Callable[[Tensor], Tensor]
OVERSAMPLE = 8
EVERY = 4
"""Blocks between two looks at the residuals."""
LEAST = 3
"""Looks that a matrix must have room for: below that, a dense decomposition is as fast."""


def krylov_svd(
    product: Product, transposed: Product, n: int, k: int, like: Tensor, most: int, near: float | None = None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The k largest singular triplets of M (m, n): U (m, k), S (k,) descending, V (n, k), signs as they come.

    `product` gives M v for v (n, b), `transposed` Mᵀ u for u (m, b). Block Golub-Kahan-Lanczos with both bases kept
    orthonormal, so that nothing is squared. Done when ‖Mᵀu − σv‖ ≤ 3e-6 σ₁ in fp32 (1e-9 σ₁ in fp64), the size of a
    dense decomposition's own error, or, with `near`, when every triplet's is at most `near` σᵢ. None where the space
    would need more than `most` columns. Musco and Musco 2015, arXiv 1504.05477.
    """
    width = k + OVERSAMPLE
    if not krylov_fits(k, most):
        return None
    tolerance = 3e-6 if like.dtype == torch.float32 else 1e-9
    start = torch.randn(n, width, generator=Generator().manual_seed(0)).to(like.device, like.dtype)
    V = Q = torch.linalg.qr(start).Q
    U, B = like.new_empty(0, 0), like.new_empty(0, 0)
    while True:
        Z = product(Q)
        P = _beside(Z, U)
        U = torch.cat((U, P), 1) if len(U) else P
        B = _bordered(B, U.mT @ Z)
        Y = transposed(P)
        rest = Y - V @ (V.mT @ Y)
        full = V.shape[1] + width > most
        if full or V.shape[1] % (EVERY * width) == 0:
            L, S, Rh = torch.linalg.svd(B)
            residual = torch.linalg.vector_norm(rest @ L[-width:, :k], dim=0)
            bound = near * S[:k] if near is not None else tolerance * S[0]
            if bool((residual <= bound).all()):
                return U @ L[:, :k], S[:k], V @ Rh[:k].mT
            if full:
                return None
        Q = _beside(rest, V)
        V = torch.cat((V, Q), 1)


def krylov_fits(k: int, most: int) -> bool:
    """Whether a space for k triplets has room to converge within `most` columns."""
    return LEAST * EVERY * (k + OVERSAMPLE) <= most


def dense(product: Product, transposed: Product, m: int, n: int, like: Tensor) -> Tensor:
    """M (m, n) itself, from the products with the shorter identity."""
    if m < n:
        return transposed(torch.eye(m, dtype=like.dtype, device=like.device)).mT
    return product(torch.eye(n, dtype=like.dtype, device=like.device))


def _beside(Z: Tensor, V: Tensor) -> Tensor:
    """Orthonormal columns for what Z has outside the span of V."""
    for _ in range(2):  # twice is enough (Kahan and Parlett), also for columns that the first time leaves as rounding
        Z = torch.linalg.qr(Z - V @ (V.mT @ Z) if len(V) else Z).Q
    return Z


def _bordered(B: Tensor, columns: Tensor) -> Tensor:
    """B (j, j) with new columns (j + b, b), and rows of zeros below it."""
    below = B.new_zeros(columns.shape[0] - B.shape[0], B.shape[1])
    return torch.cat((torch.cat((B, below)), columns), 1)
