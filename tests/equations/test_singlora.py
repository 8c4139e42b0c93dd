"""SingLoRA against the difference of two symmetric products."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise


@pytest.mark.parametrize(("d_in", "d_out"), [(20, 12), (12, 20), (15, 15)])
def test_forward(d_in, d_out):
    model, fc, x = adapted(ll.SingLoRAConfig(r=3, alpha=7, dtype="float64"), d_in, d_out)
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    randomise(model)
    A0 = fc.lora_A0.mT
    A = A0 + fc.lora_A.mT
    want = 7 / 3 * (A[:d_out] @ A[:d_in].mT - A0[:d_out] @ A0[:d_in].mT).detach()
    torch.testing.assert_close(dense_change(model, d_in), want, atol=1e-10, rtol=0)
    if d_in == d_out:
        torch.testing.assert_close(want, want.mT)
