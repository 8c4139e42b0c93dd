"""Whole: a change of the weight and the bias, entry by entry; on a norm, of its gain and its bias."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from equations.helpers import adapted, randomise


@pytest.mark.parametrize("bias", [True, False])
def test_forward(bias):
    model, fc, x = adapted(ll.WholeConfig(dtype="float64"), bias=bias)
    randomise(model)
    W = fc.weight + fc.lora_W
    b = fc.bias + fc.lora_b if bias else torch.zeros(12, dtype=torch.float64)
    want = [[W[j] @ row + b[j] for j in range(12)] for row in x]
    torch.testing.assert_close(model(x), torch.stack([torch.stack(row) for row in want]), atol=1e-10, rtol=0)
    assert hasattr(fc, "lora_b") == bias


@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm])
def test_on_a_norm(make):
    torch.manual_seed(0)
    norm = make(12).double()
    for p in norm.parameters():
        nn.init.normal_(p)
    norm.weight.data[3] = 0  # nothing may be divided by a weight
    model, x = nn.Sequential(norm), torch.randn(5, 12, dtype=torch.float64)
    bare = model(x)
    ll.attach(model, ll.WholeConfig(target_kinds=("norm",), dtype="float64"))
    assert torch.equal(model(x), bare)
    randomise(model)
    gain, bias = norm.weight + norm.lora_W[:, 0], 0
    n = x if make is nn.RMSNorm else x - x.mean(1, keepdim=True)
    eps = norm.eps if norm.eps is not None else torch.finfo(torch.float64).eps
    n = n / (n.square().mean(1, keepdim=True) + eps).sqrt()
    if make is nn.LayerNorm:
        bias = norm.bias + norm.lora_b
    torch.testing.assert_close(model(x), n * gain + bias, atol=1e-10, rtol=0)
