"""ROAD against its 2x2 matrices, pair by pair."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from equations.helpers import adapted, randomise


def dense(fc, k, pairs, d):
    """The paper's R from a list of partners."""
    R = torch.zeros(d, d).double()
    a, t = 1 + fc.lora_alpha, fc.lora_theta
    rows = {1: [0, 0, 0, 0], 2: [0, 0, 1, 1], 4: [0, 1, 2, 3]}[k]
    for p, (i, j) in enumerate(pairs):
        w, x, y, z = ((a[m, p], t[m, p]) for m in rows)
        R[i, i] = w[0] * w[1].cos()
        if j is not None:
            R[i, j] = -x[0] * x[1].sin()
            R[j, i] = y[0] * y[1].sin()
            R[j, j] = z[0] * z[1].cos()
    return R


NEIGHBOURS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11), (12, None)]
GROUPS_OF_4 = [(0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, None)]
GROUPS_OF_8 = [(0, 4), (1, 5), (2, 6), (3, 7), (8, 11), (9, 12), (10, None)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("d", [12, 13])
@pytest.mark.parametrize(("group", "pairs"), [(2, NEIGHBOURS), (4, GROUPS_OF_4), (8, GROUPS_OF_8)])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_forward_and_gradients(k, group, pairs, d, bias):
    if d == 12:
        pairs = [(8, 10), (9, 11)] if group == 8 else pairs[4:6]
        pairs = {2: NEIGHBOURS, 4: GROUPS_OF_4, 8: GROUPS_OF_8}[group][:4] + pairs
    model, fc, x = adapted(ll.RoadConfig(per_pair=k, group_size=group, dtype="float64"), d_out=d, bias=bias)
    randomise(model, 0.7)
    x.requires_grad_()
    want = nn.functional.linear(x, fc.weight, fc.bias) @ dense(fc, k, pairs, d).mT
    torch.testing.assert_close(model(x), want, atol=1e-10, rtol=0)
    tensors = (x, fc.lora_alpha, fc.lora_theta)
    mine = torch.autograd.grad((model(x) ** 2).sum(), tensors)
    other = torch.autograd.grad((want**2).sum(), tensors)
    for got, wanted in zip(mine, other, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)


def test_rotation_keeps_norms_and_tied_rows_agree():
    model, fc, x = adapted(ll.RoadConfig(per_pair=1, group_size=64, dtype="float64"))
    y = model(x)
    nn.init.normal_(fc.lora_theta)
    torch.testing.assert_close(model(x).norm(dim=-1), y.norm(dim=-1))
    one = model(x)
    for k in (2, 4):
        other, layer, _ = adapted(ll.RoadConfig(per_pair=k, group_size=64, dtype="float64"))
        layer.lora_theta.data.copy_(fc.lora_theta.data.expand(k, -1))
        torch.testing.assert_close(other(x), one)


def test_second_derivatives():
    model, fc, x = adapted(ll.RoadConfig(group_size=8, dtype="float64"), d_out=13)
    randomise(model)
    forward = lambda v, a: torch.func.functional_call(model, {"fc.lora_alpha": a}, (v,))  # noqa: E731
    x.requires_grad_()
    assert torch.autograd.gradgradcheck(forward, (x, fc.lora_alpha.detach().clone().requires_grad_()))


def test_one_output():
    model, fc, x = adapted(ll.RoadConfig(dtype="float64"), d_out=1)
    randomise(model)
    model(x).sum().backward()
    want = nn.functional.linear(x, fc.weight, fc.bias) * (1 + fc.lora_alpha[0]) * fc.lora_theta[0].cos()
    torch.testing.assert_close(model(x), want)
