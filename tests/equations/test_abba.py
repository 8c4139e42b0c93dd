"""ABBA: the start from the weight, and the elementwise product."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise

ALPHA = 7.0


@pytest.mark.parametrize("r", [2, 3], ids=["factors", "dense"])
def test_start_and_forward(r):
    model, fc, x = adapted(ll.ABBAConfig(r=r, alpha=ALPHA, dtype="float64"))
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    U, S, Vh = torch.linalg.svd(fc.weight)
    torch.testing.assert_close(fc.lora_B1 @ fc.lora_A1, (U[:, :r] * S[:r]) @ Vh[:r])
    torch.testing.assert_close(fc.lora_A1 @ fc.lora_A1.mT, torch.diag(S[:r]), atol=1e-10, rtol=0)
    torch.testing.assert_close(fc.lora_B1.mT @ fc.lora_B1, torch.diag(S[:r]), atol=1e-10, rtol=0)
    assert 0.7 * (6 / 20) ** 0.5 < fc.lora_A2.abs().max() <= (6 / 20) ** 0.5
    randomise(model)
    want = ALPHA * torch.mul(fc.lora_B1 @ fc.lora_A1, fc.lora_B2 @ fc.lora_A2)
    torch.testing.assert_close(dense_change(model), want.detach(), atol=1e-10, rtol=0)
