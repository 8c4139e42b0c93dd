"""MiCA: the frozen directions and the update."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise


@pytest.mark.parametrize("use_rslora", [False, True])
def test_start_and_forward(use_rslora):
    model, fc, x = adapted(ll.MiCAConfig(r=3, alpha=7, use_rslora=use_rslora, dtype="float64"))
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    U, S, _ = torch.linalg.svd(fc.weight)
    torch.testing.assert_close(fc.lora_B @ fc.lora_B.mT, U[:, -3:] @ U[:, -3:].mT)
    torch.testing.assert_close((fc.lora_B.mT @ fc.weight).norm(dim=1), S[-3:])
    assert [n for n, p in fc.named_parameters() if p.requires_grad] == ["lora_A"]
    randomise(model)
    want = 7 / (3**0.5 if use_rslora else 3) * fc.lora_B @ fc.lora_A
    torch.testing.assert_close(dense_change(model), want.detach(), atol=1e-10, rtol=0)
