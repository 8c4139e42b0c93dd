"""GOFT against one dense Givens matrix after the other."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, randomise


def rotations(d, theta):
    """The product G_1 G_2 ⋯ of the tree, and the pairs it turned."""
    R, pairs, alive, angles = torch.eye(d).double(), [], list(range(d)), iter(theta)
    while len(alive) > 1:
        for i, j in zip(alive[::2], alive[1::2], strict=False):
            t, G = next(angles), torch.eye(d).double()
            G[i, i] = G[j, j] = t.cos()
            G[i, j], G[j, i] = t.sin(), -t.sin()
            R = R @ G
            pairs.append((i, j))
        alive = alive[::2]
    return R, pairs


@pytest.mark.parametrize("d", [2, 3, 7, 16, 20, 21])
def test_forward(d):
    model, fc, x = adapted(ll.GOFTConfig(dtype="float64"), d_in=d)
    randomise(model, 1.0)
    R, pairs = rotations(d, fc.lora_theta)
    assert len(pairs) == d - 1 == fc.lora_theta.numel()
    assert {i for p in pairs for i in p} == set(range(d))
    torch.testing.assert_close(R @ R.mT, torch.eye(d).double())
    want = torch.nn.functional.linear(x @ R, fc.weight, fc.bias)
    torch.testing.assert_close(model(x), want, atol=1e-10, rtol=0)
    mine, other = (torch.autograd.grad((y**2).sum(), fc.lora_theta)[0] for y in (model(x), want))
    torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-9)


def test_pairs_of_eight():
    assert rotations(8, torch.zeros(7))[1] == [(0, 1), (2, 3), (4, 5), (6, 7), (0, 2), (4, 6), (0, 4)]
