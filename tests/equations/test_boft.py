"""BOFT against dense butterfly factors, built entry by entry."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, randomise


def skew(theta, b):
    Q, entries = torch.zeros(b, b).double(), iter(theta)
    for i in range(b):
        for j in range(i + 1, b):
            Q[i, j] = next(entries)
    return Q - Q.mT


def cayley(Q):
    eye = torch.eye(len(Q)).double()
    return (eye + Q) @ torch.linalg.inv(eye - Q)


def factor(fc, i, d, b):
    """B_i, i from 1: which coordinates each block rotates, spelled out."""
    B, far, h = torch.eye(d).double(), 2 ** (i - 1), b // 2
    for n, theta in enumerate(getattr(fc, f"lora_Q{i}")):
        first = (n // far) * far * b + (n % far) * h  # where the block's first half-block begins
        where = [first + k for k in range(h)] + [first + far * h + k for k in range(h)]
        B[torch.tensor(where)[:, None], torch.tensor(where)] = cayley(skew(theta, b))
    if i == 1 and d % b > 1:
        B[d - d % b :, d - d % b :] = cayley(skew(fc.lora_tail[0], d % b))
    return B


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("d", "b", "m", "present"), [(20, 4, 2, 2), (16, 4, 3, 3), (24, 2, 4, 4), (11, 4, 3, 2), (3, 4, 2, 0)]
)
def test_forward(d, b, m, present, bias):
    model, fc, x = adapted(ll.BOFTConfig(block_size=b, n_factors=m, dtype="float64"), d_in=d, bias=bias)
    randomise(model)
    assert sum(hasattr(fc, f"lora_Q{i}") for i in range(1, m + 1)) == present
    z = x
    for i in range(present, 0, -1):
        z = z @ factor(fc, i, d, b)
    if not present:
        z = x @ cayley(skew(fc.lora_tail[0], d))
    torch.testing.assert_close(z.norm(dim=-1), x.norm(dim=-1))
    want = (z @ fc.weight.mT) * (1 + fc.lora_s) + (fc.bias if bias else 0)
    torch.testing.assert_close(model(x), want, atol=1e-10, rtol=0)


def test_factors_reach_everything():
    """log2(d/b) + 1 factors connect every input with every other."""
    _, fc, _ = adapted(ll.BOFTConfig(block_size=4, n_factors=3, dtype="float64"), d_in=16)
    for i in (1, 2, 3):
        torch.nn.init.normal_(getattr(fc, f"lora_Q{i}"))
    B = [factor(fc, i, 16, 4) for i in (1, 2, 3)]
    assert bool((B[2] @ B[1] @ B[0]).abs().min() > 0)
    assert bool((B[1] @ B[0]).abs().min() == 0)
