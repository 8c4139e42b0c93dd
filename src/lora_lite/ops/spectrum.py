"""Leading eigenvectors and singular triplets: a Krylov space with a proof of convergence, dense decompositions
otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from .krylov import Product, dense, krylov_svd

SHARE = 4
"""A Krylov space of more than a fourth of the shorter side takes as long as a dense decomposition."""
BURIED = 1e-9
"""Share of the largest eigenvalue below which an eigenvector in fp64 is rounding."""


def fix_signs(V: Tensor) -> Tensor:
    """±1 per column of V (d, k) such that multiplying by it makes each column's largest entry positive."""
    largest = V.gather(0, V.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -torch.ones_like(largest), torch.ones_like(largest))


def top_eigh(C: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues (k,), descending, and eigenvectors (d, k) of a positive semi-definite C (d, d), signs
    fixed."""
    found = krylov_svd(lambda v: C @ v, lambda v: C @ v, C.shape[0], k, C, C.shape[0] // SHARE)
    if found is None:
        e, V = torch.linalg.eigh(C)
        e, V = e[-k:].flip(0), V[:, -k:].flip(1)
    else:
        e, V = found[1:]
    return e.clamp_min(0), V * fix_signs(V)


def top_eigh_of_rows(X: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """`top_eigh` of XᵀX for X (n, d) with fewer rows than columns: XᵀX v = λ v for v = Xᵀu/√λ where XXᵀ u = λ u, an
    (n, n) decomposition in fp64. None where X has no k directions that rounding leaves alone."""
    if k > X.shape[0]:
        return None
    rows = X.to(torch.float64) if X.device.type != "mps" else X
    e, U = torch.linalg.eigh(rows @ rows.mT)
    e, U = e[-k:].flip(0), U[:, -k:].flip(1)
    if not bool(e[-1] > BURIED * e[0]):
        return None
    V = rows.mT @ U / e.sqrt()
    return e.to(X.dtype), (V * fix_signs(V)).to(X.dtype)


def top_svd(M: Tensor, k: int, decays: bool = False, near: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest singular triplets of M (m, n): U (m, k), S (k,) descending, V (n, k), signs fixed by V.

    `decays`: the spectrum is known to fall off, as a gradient's does, so a Krylov space is worth a longer try. `near`:
    triplets with a residual of at most `near` σᵢ are good enough where a Krylov space is tried at all.
    """
    most = min(M.shape) // (2 if decays else SHARE)
    found = krylov_svd(lambda v: M @ v, lambda u: M.mT @ u, M.shape[1], k, M, most, near)
    U, S, V = _dense(M, k) if found is None else found
    sign = fix_signs(V)
    return U * sign, S, V * sign


def top_left(product: Product, transposed: Product, m: int, n: int, k: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """U (m, k) and S (k,) of the k largest singular triplets of an M (m, n) that is only multiplied with; signs by U.

    `product` gives M v for v (n, b), `transposed` Mᵀ u for u (m, b), in the dtype and on the device of `like`.
    """
    found = krylov_svd(product, transposed, n, k, like, min(m, n) // 2)
    U, S, _ = _dense(dense(product, transposed, m, n, like), k) if found is None else found
    return U * fix_signs(U), S


def product_svd(L: Tensor, R: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`top_svd` of L Rᵀ for tall L (m, n) and R (d, n), k ≤ n, from the product of their triangles, (n, n)."""
    (QL, TL), (QR, TR) = torch.linalg.qr(L), torch.linalg.qr(R)
    U, S, Vh = torch.linalg.svd(TL @ TR.mT)
    V = QR @ Vh[:k].mT
    sign = fix_signs(V)
    return QL @ U[:, :k] * sign, S[:k], V * sign


def _dense(M: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    tall = M.shape[0] > M.shape[1]
    N = M if tall else M.mT
    Q = _gram(N, k)
    if Q is None:
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        return U[:, :k], S[:k], Vh[:k].mT
    # N Q has the singular values of N itself, not their squares
    U, S, Wh = torch.linalg.svd(N @ Q, full_matrices=False)
    return (U, S, Q @ Wh.mT) if tall else (Q @ Wh.mT, S, U)


def _gram(N: Tensor, k: int) -> Tensor | None:
    """The k leading right singular vectors of a tall N as eigenvectors of NᵀN: a third to a half of the time of an SVD,
    and closer to the truth, while the k-th singular value is not small beside the first, whose square buries it. Then
    fp64, or None."""
    for dtype in (N.dtype, torch.float64) if N.dtype != torch.float64 else (N.dtype,):
        T = N.to(dtype)
        e, V = torch.linalg.eigh(T.mT @ T)
        floor = 1e-2 if dtype == N.dtype else 1e-8
        if bool(e[-k:][0] > floor * e[-1]):
            return V[:, -k:].flip(1).to(N.dtype)
    return None
