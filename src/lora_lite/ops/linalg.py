"""What torch.linalg and torch.block_diag do, with types: torch declares none for them."""

from __future__ import annotations

import torch
from torch import Tensor

DecompositionError: type[RuntimeError] = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]
"""What torch raises where a decomposition fails."""


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
