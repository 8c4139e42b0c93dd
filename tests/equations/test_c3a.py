"""C3A against its circulant blocks, entry by entry, with gradients."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, randomise


def dense(w, d_in):
    """The update, one entry after the other."""
    m, n, b = w.shape
    rows = [[w[k // b, j // b, (j % b - k % b) % b] for j in range(n * b)] for k in range(m * b)]
    return torch.stack([torch.stack(row) for row in rows]) / d_in


@pytest.mark.parametrize(("block", "b"), [(256, 4), (3, 2), (1, 1)])
def test_forward_and_gradients(block, b):
    model, fc, x = adapted(ll.C3AConfig(r=3, alpha=7, block=block, dtype="float64"))
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    assert fc.lora_w.shape == (12 // b, 20 // b, b)
    randomise(model, 3.0)
    x.requires_grad_()
    want = torch.nn.functional.linear(x, fc.weight + dense(fc.lora_w, 20), fc.bias)
    torch.testing.assert_close(model(x), want, atol=1e-10, rtol=0)
    for mine, other in zip(
        torch.autograd.grad((model(x) ** 2).sum(), (x, fc.lora_w)),
        torch.autograd.grad((want**2).sum(), (x, fc.lora_w)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-9)


def test_a_block_must_be_positive():
    with pytest.raises(ll.ConfigError, match="block"):
        ll.C3AConfig(block=0)
