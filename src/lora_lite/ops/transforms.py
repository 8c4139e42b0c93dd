"""Fourier transforms, block-diagonal matrices and other functions of torch, with their types written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import own_products


def block_diag(blocks: Sequence[Tensor]) -> Tensor:
    """The matrix with these blocks on its diagonal."""
    return torch.block_diag(*blocks)


def rfft(x: Tensor) -> Tensor:
    """Fourier transform of real x along its last dimension, the non-negative frequencies; MKL takes no empty batch."""
    return torch.fft.rfft(x) if x.numel() else x[..., : x.shape[-1] // 2 + 1] * (1 + 0j)


def irfft(x: Tensor, n: int) -> Tensor:
    """The inverse of `rfft`, n numbers long."""
    return torch.fft.irfft(x, n) if x.numel() else x.real[..., :1].expand(*x.shape[:-1], n)


def mixed(X: Tensor, K: Tensor) -> Tensor:
    """Σ_n K_mnf X_nf for X (..., n, f) and K (m, n, f), complex: one product per frequency. K is conjugated in memory,
    not by a mark, with which torch copies the factors of every frequency apart."""
    return torch.einsum("...nf,mnf->...mf", X, K)


def _listed(x: Tensor) -> Tensor:
    """x (..., n, f) as (tokens, n, f)."""
    return x.reshape(-1, *x.shape[-2:])


class _Correlation(torch.autograd.Function):
    """Keeps x and w, not their spectra, and takes transforms of real numbers in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, w)
        return irfft(mixed(rfft(x), spectrum(w)), w.shape[-1])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x, w), needed, G = ctx.saved_tensors, ctx.needs_input_grad, rfft(g)
        at_x = at_w = None
        if needed[0]:
            at_x = irfft(mixed(G, rfft(w).transpose(0, 1)), w.shape[-1])
        if needed[1]:
            at_w = irfft(torch.einsum("tmf,tnf->mnf", _listed(G).conj_physical(), _listed(rfft(x))), w.shape[-1])
        return at_x, at_w


def spectrum(w: Tensor) -> Tensor:
    """What `correlation` multiplies with in the Fourier domain."""
    return rfft(w).conj_physical()


def correlation(x: Tensor, w: Tensor, K: Tensor) -> Tensor:
    """y_mk = Σ_n Σ_j w_mn(j−k) x_nj, indices mod b, for x (..., n, b), w (m, n, b) and K = `spectrum(w)`."""
    if own_products(w):
        return _Correlation.apply(x, w)  # pyright: ignore[reportReturnType]
    return irfft(mixed(rfft(x), K), w.shape[-1])


def to_frequencies(x: Tensor) -> Tensor:
    """`rfft` of x (..., n) as real numbers, (..., 2 (n//2 + 1)): real and imaginary part of each frequency."""
    return torch.view_as_real(rfft(x)).flatten(-2)


def from_frequencies(z: Tensor, n: int) -> Tensor:
    """The inverse of `to_frequencies`, (..., n)."""
    pairs: Tensor = z.unflatten(-1, (-1, 2))
    return irfft(torch.view_as_complex(pairs), n)


def orthonormal_basis(P: Tensor) -> Tensor:
    """Q of P = Q R: orthonormal columns that span those of P."""
    return torch.linalg.qr(P).Q


def frobenius(M: Tensor) -> Tensor:
    """The Frobenius norm, with gradient 0 at M = 0."""
    return torch.linalg.matrix_norm(M)


def ascending(t: Tensor) -> Tensor:
    """The distinct numbers of t, ascending."""
    return t.unique()
