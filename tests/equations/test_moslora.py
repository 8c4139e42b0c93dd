"""MoSLoRA against the product of its three matrices."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise


@pytest.mark.parametrize("use_rslora", [False, True])
def test_forward_and_factors(use_rslora):
    model, fc, x = adapted(ll.MoSLoRAConfig(r=3, alpha=7, use_rslora=use_rslora, dtype="float64"))
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    randomise(model)
    want = torch.zeros(12, 20).double()
    for i in range(3):  # every rank of B meets every rank of A
        for k in range(3):
            want += fc.lora_M[i, k] * torch.outer(fc.lora_B[:, i], fc.lora_A[k])
    want = 7 / (3**0.5 if use_rslora else 3) * want.detach()
    torch.testing.assert_close(dense_change(model), want, atol=1e-10, rtol=0)
    ll.activate(model, None)
    ll.combine(model, {"default": 0.5}, name="half")
    torch.testing.assert_close(dense_change(model), 0.5 * want, atol=1e-10, rtol=0)
