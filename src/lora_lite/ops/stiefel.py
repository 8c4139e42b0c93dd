"""Matrices with orthonormal rows."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def orthonormal_rows(T: Tensor) -> Tensor:
    """R (..., r, d) with R Rᵀ = I and the row space of T: Gram-Schmidt from the first row on, each R_i with a positive
    share of T_i. Differentiable; T has rank r."""
    Q, L = torch.linalg.qr(T.mT)
    sign = torch.where(L.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(T.dtype)
    return (Q * sign[..., None, :]).mT


def fill_orthonormal_rows(t: Tensor, generator: Generator) -> None:
    """Random orthonormal rows, uniform over all such matrices."""
    t.copy_(orthonormal_rows(t.normal_(generator=generator)))
