"""Leading eigenvectors and singular triplets: block Lanczos with a proof of convergence, dense decompositions
otherwise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

BLOCKS = 8
OVERSAMPLE = 8
BURIED = 1e-9
"""Share of the largest eigenvalue below which an eigenvector in fp64 is rounding."""


def fix_signs(V: Tensor) -> Tensor:
    """±1 per column of V (d, k) such that multiplying by it makes each column's largest entry positive."""
    largest = V.gather(0, V.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -torch.ones_like(largest), torch.ones_like(largest))


def top_eigh(C: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues (k,), descending, and eigenvectors (d, k) of a positive semi-definite C (d, d), signs
    fixed."""
    found = _lanczos(lambda v: C @ v, C, C.shape[0], k)
    if found is None:
        e, V = torch.linalg.eigh(C)
        found = e[-k:].flip(0), V[:, -k:].flip(1)
    e, V = found
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


def top_svd(M: Tensor, k: int, decays: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest singular triplets of M (m, n): U (m, k), S (k,) descending, V (n, k), signs fixed by V.

    `decays`: the spectrum is known to fall off, as a gradient's does, so Lanczos is worth trying on smaller matrices.
    """
    tall = M.shape[0] > M.shape[1]
    N = M if tall else M.mT  # iterate on the shorter side
    found = _lanczos(lambda v: N.mT @ (N @ v), M, N.shape[1], k, 3 if decays else 6)
    Q = found[1] if found is not None else _gram(N, k)
    if Q is None:
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        U, S, V = U[:, :k], S[:k], Vh[:k].mT
    else:  # N Q has the singular values of N itself, not their squares
        U, S, Wh = torch.linalg.svd(N @ Q, full_matrices=False)
        U, V = (U, Q @ Wh.mT) if tall else (Q @ Wh.mT, U)
    sign = fix_signs(V)
    return U * sign, S, V * sign


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


def _lanczos(
    apply: Callable[[Tensor], Tensor], like: Tensor, d: int, k: int, worth: int = 6
) -> tuple[Tensor, Tensor] | None:
    """Ritz pairs of a symmetric operator on R^d in a block Krylov space, or None where that is no gain or has not
    converged."""
    width = k + OVERSAMPLE
    if worth * BLOCKS * width > d:  # flat spectra do not converge, and then the time is lost
        return None
    start = torch.randn(d, width, generator=Generator().manual_seed(0)).to(like.device, like.dtype)
    Q = torch.linalg.qr(start).Q
    V = Q
    for _ in range(BLOCKS - 1):
        Z = apply(Q)
        for _ in range(2):  # twice is enough: Kahan and Parlett
            Z = Z - V @ (V.mT @ Z)
        Q = torch.linalg.qr(Z).Q
        V = torch.cat((V, Q), 1)
    V = torch.linalg.qr(V).Q  # a rank-deficient operator fills blocks with arbitrary columns
    T = V.mT @ apply(V)
    e, W = torch.linalg.eigh((T + T.mT) / 2)
    e, X = e[-k:].flip(0), V @ W[:, -k:].flip(1)
    residual = torch.linalg.vector_norm(apply(X) - X * e, dim=0)
    tolerance = 3e-6 if like.dtype == torch.float32 else 1e-9
    # as the backward error of singular triplets: measured by the first eigenvalue alone, a large first would hide
    # errors in all others
    return (e, X) if bool((residual <= tolerance * (e[0] * e.clamp_min(0)).sqrt()).all()) else None
