"""Fourier transforms, block-diagonal matrices and other functions of torch, with their types written out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def block_diag(blocks: Sequence[Tensor]) -> Tensor:
    """The matrix with these blocks on its diagonal."""
    return torch.block_diag(*blocks)


def rfft(x: Tensor) -> Tensor:
    """Fourier transform of real x along its last dimension, the non-negative frequencies."""
    return torch.fft.rfft(x)


def irfft(x: Tensor, n: int) -> Tensor:
    """The inverse of `rfft`, n numbers long."""
    return torch.fft.irfft(x, n)


def irfft2(x: Tensor, rows: int, columns: int) -> Tensor:
    """The real (rows, columns) matrix whose two-dimensional Fourier transform has the half x."""
    return torch.fft.irfft2(x, s=(rows, columns))


def orthonormal_basis(P: Tensor) -> Tensor:
    """Q of P = Q R: orthonormal columns that span those of P."""
    return torch.linalg.qr(P).Q


def frobenius(M: Tensor) -> Tensor:
    """The Frobenius norm, with gradient 0 at M = 0."""
    return torch.linalg.matrix_norm(M)


def ascending(t: Tensor) -> Tensor:
    """The distinct numbers of t, ascending."""
    return t.unique()
