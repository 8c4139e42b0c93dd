"""Bases scaled from two sides: the written backward pass against finite differences, and what it keeps."""

from __future__ import annotations

import pytest
import torch

from lora_lite.ops.bases import scaled_bases


def draw():
    g = torch.Generator().manual_seed(5)
    A, scales, gains = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((3, 7), (3, 4), (4, 7)))
    return A, scales.requires_grad_(), gains.requires_grad_()


def test_values_and_gradients():
    A, scales, gains = draw()
    torch.testing.assert_close(scaled_bases(A, scales, gains), torch.einsum("kj,ki,ij->kij", A, scales, gains))
    assert torch.autograd.gradcheck(lambda s, g: scaled_bases(A, s, g), (scales, gains))
    assert torch.autograd.gradcheck(lambda s: scaled_bases(A, s, gains.detach()), (scales,))


@pytest.mark.parametrize("trained", [True, False])
def test_bases_that_are_trained_get_their_gradient(trained):
    A, scales, gains = draw()
    A.requires_grad_(trained)
    scaled_bases(A, scales, gains).sum().backward()
    expected = torch.einsum("ki,ij->kj", scales, gains).detach() if trained else None
    assert (A.grad is None) == (expected is None)
    if expected is not None:
        torch.testing.assert_close(A.grad, expected)


def test_nothing_of_the_size_of_the_result_is_kept():
    A, scales, gains = draw()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        result = scaled_bases(A, scales, gains)
    assert max(kept) < result.numel() and sum(kept) == A.numel() + scales.numel() + gains.numel()


def test_under_transforms_of_functions():
    A, scales, gains = draw()
    found = torch.func.grad(lambda s: scaled_bases(A, s, gains.detach()).square().sum())(scales.detach())
    again = torch.autograd.grad(scaled_bases(A, scales, gains).square().sum(), scales)[0]
    torch.testing.assert_close(found, again)
