"""What torch.linalg and torch.block_diag do, with types: torch declares none for them."""

from __future__ import annotations

import torch
from torch import Tensor


def precise(t: Tensor) -> Tensor:
    """t in fp32, or as it is where that is better."""
    return t.to(torch.promote_types(torch.float32, t.dtype))


def norm(t: Tensor) -> Tensor:
    """‖t‖ over all entries, ()."""
    return torch.linalg.vector_norm(t)


def thin_svd(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """M (m, n) = U diag(S) Vᵀ with k = min(m, n): U (m, k), S (k,) descending, Vᵀ (k, n); signs as they come."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return U, S, Vh


def cholesky(C: Tensor) -> Tensor:
    """The lower triangle L with L Lᵀ = C."""
    return torch.linalg.cholesky(C)


def block_diagonal(D: Tensor) -> Tensor:
    """(nb, nb) with the blocks D (n, b, b) on its diagonal."""
    return torch.block_diag(*D)


def inverse(M: Tensor) -> Tensor:
    """M⁻¹, computed in fp64."""
    return torch.linalg.inv(M.double()).to(M.dtype)


def eigenvectors(M: Tensor) -> Tensor:
    """The orthonormal eigenvectors of a symmetric M (n, n) as columns, eigenvalues ascending; signs as they come."""
    return torch.linalg.eigh(M)[1]


def thin_qr(M: Tensor) -> tuple[Tensor, Tensor]:
    """M (m, n) = Q R with orthonormal columns in Q (m, n), m ≥ n."""
    Q, R = torch.linalg.qr(M)
    return Q, R


def clusters(points: Tensor, k: int, rounds: int, generator: torch.Generator) -> Tensor:
    """The cluster of each of the points (n, d), (n,) below k: k-means from k random points on."""
    first = torch.randperm(len(points), generator=generator)[:k]
    centres = points[first.to(points.device)]
    nearest = torch.cdist(points, centres).argmin(1)
    for _ in range(rounds):
        sums = torch.zeros_like(centres).index_add(0, nearest, points)
        counts = nearest.bincount(minlength=len(centres)).to(points.dtype)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
        nearest = torch.cdist(points, centres).argmin(1)
    return nearest
