"""BitFit: a change of the bias, and merging gives a bias to a layer that had none."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, randomise


@pytest.mark.parametrize("bias", [True, False])
def test_forward(bias):
    model, fc, x = adapted(ll.BitFitConfig(dtype="float64"), bias=bias)
    randomise(model)
    b = fc.lora_b + (fc.bias if bias else 0)
    want = [[fc.weight[j] @ row + b[j] for j in range(12)] for row in x]
    torch.testing.assert_close(model(x), torch.stack([torch.stack(row) for row in want]), atol=1e-10, rtol=0)
    ll.merge(model)
    torch.testing.assert_close(fc.bias, b)
    ll.unmerge(model)
    assert (fc.bias is not None) == bias
