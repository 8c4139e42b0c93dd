"""LoHa against the elementwise product of two dense matrices."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise

ALPHA = 7.0


@pytest.mark.parametrize("r", [2, 3], ids=["factors", "dense"])
def test_forward_and_factors(r):
    model, fc, x = adapted(ll.LoHaConfig(r=r, alpha=ALPHA, dtype="float64"))
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    randomise(model)
    want = torch.zeros(12, 20).double()
    for j in range(12):
        for i in range(20):
            first = sum(fc.lora_B1[j, k] * fc.lora_A1[k, i] for k in range(r))
            second = sum(fc.lora_B2[j, k] * fc.lora_A2[k, i] for k in range(r))
            want[j, i] = ALPHA / r * first * second
    torch.testing.assert_close(dense_change(model), want.detach(), atol=1e-10, rtol=0)
    torch.testing.assert_close(model(x), torch.nn.functional.linear(x, fc.weight + want, fc.bias), atol=1e-10, rtol=0)


def test_no_dense_temporary_while_the_factors_are_smaller():
    model, fc, x = adapted(ll.LoHaConfig(r=2, alpha=ALPHA, dtype="float64"), d_in=60, d_out=50)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != fc.weight.data_ptr():
                sizes.append(out.numel())
            return out

    with Watch():
        model(x).sum().backward()
    assert 0 < max(sizes) < fc.weight.numel() / 4
