"""Transforms and what is computed with them, against sums written out, with gradients."""

from __future__ import annotations

import pytest
import torch

from lora_lite.ops.transforms import correlation, from_frequencies, spectrum, to_frequencies


@pytest.mark.parametrize("b", [1, 2, 5, 6])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_correlation(b, shape):
    x = torch.randn(*shape, 3, b, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, b, dtype=torch.float64, requires_grad=True)
    k = torch.arange(b)
    want = torch.einsum("mnkj,...nj->...mk", w[..., (k - k[:, None]) % b], x)
    torch.testing.assert_close(correlation(x, w, spectrum(w)), want)
    with torch.no_grad():
        torch.testing.assert_close(correlation(x, w, spectrum(w)), want)
    slopes = torch.randn_like(want)
    for mine, other in zip(
        torch.autograd.grad(correlation(x, w, spectrum(w)), (x, w), slopes),
        torch.autograd.grad(want, (x, w), slopes),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_the_slopes_of_a_correlation_have_slopes():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, w: correlation(x, w, spectrum(w)), (x, w))


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_frequencies_as_real_numbers(n):
    x = torch.randn(3, n, dtype=torch.float64)
    z = to_frequencies(x)
    assert z.shape == (3, 2 * (n // 2 + 1))
    torch.testing.assert_close(from_frequencies(z, n), x)
