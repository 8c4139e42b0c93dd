"""Singular triplets in a reproducible form: seeded, signs fixed, and the square root split between two factors."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from .spectrum import fix_signs

OVERSAMPLE = 10


def randomised_svd(W: Tensor, k: int, niter: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """About the k largest singular triplets of W (m, n): U (m, k), S (k,), V (n, k), signs fixed by V.

    `niter` rounds of subspace iteration on k + 10 random vectors (Halko, Martinsson, Tropp 2011, arXiv 0909.4061,
    algorithm 4.4).
    """
    width = min(k + OVERSAMPLE, *W.shape)
    start = torch.randn(W.shape[1], width, generator=generator, dtype=torch.float32)
    Q = torch.linalg.qr(W @ start.to(W)).Q
    for _ in range(niter):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ W, full_matrices=False)
    U, V = Q @ U[:, :k], Vh[:k].mT
    sign = fix_signs(V)
    return U * sign, S[:k], V * sign


def bottom_svd(W: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k smallest singular triplets of W (m, n), k ≤ min(m, n): U (m, k), S (k,) descending, V (n, k), signs fixed
    by V."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    V = Vh[-k:].mT
    sign = fix_signs(V)
    return U[:, -k:] * sign, S[-k:], V * sign


def balanced_factors(U: Tensor, S: Tensor, V: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """A (k, n) and B (m, k) of equal norm with s BA = U diag(S) Vᵀ."""
    root = (S / abs(s)).sqrt()
    return (V * root).mT, U * math.copysign(1, s) * root
