"""Randomised triplets are near the true ones, and their factors carry the sign of the scale."""

from __future__ import annotations

import pytest
import torch

from lora_lite.ops.svd import balanced_factors, bottom_svd, randomised_svd


def matrix(m=80, n=60, decay=0.97):
    g = torch.Generator().manual_seed(1)
    U, V = (torch.linalg.qr(torch.randn(d, n, generator=g, dtype=torch.float64)).Q for d in (m, n))
    return U * decay ** torch.arange(n) @ V.mT


def error(niter):
    W = matrix()
    U, S, V = randomised_svd(W, 5, niter, torch.Generator().manual_seed(0))
    best = torch.linalg.svdvals(W)[5:].norm()
    return float(((W - U * S @ V.mT).norm() - best) / best)


def test_rounds_of_iteration_bring_the_triplets_near():
    """The spectrum falls slowly, so that a plain projection is visibly off."""
    assert error(0) > 0.02 > 1e-3 > error(8)


def test_the_generator_decides():
    W = matrix()
    one, same, other = (randomised_svd(W, 3, 0, torch.Generator().manual_seed(s))[1] for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_the_smallest_triplets():
    W = matrix(9, 7, 0.5)
    U, S, V = bottom_svd(W, 2)
    torch.testing.assert_close(S, torch.linalg.svdvals(W)[-2:])
    torch.testing.assert_close(W @ V, U * S)
    largest = V.gather(0, V.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("s", [2.5, -2.5])
def test_balanced_factors(s):
    W = matrix(9, 7, 0.5)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    A, B = balanced_factors(U, S, Vh.mT, s)
    torch.testing.assert_close(s * B @ A, W)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))
