"""HiRA against the weight, entry by entry."""

from __future__ import annotations

import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise


def test_forward():
    model, fc, x = adapted(ll.HiRAConfig(r=3, alpha=7, dtype="float64"))
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    randomise(model)
    want = torch.zeros(12, 20).double()
    for j in range(12):
        for i in range(20):
            want[j, i] = fc.weight[j, i] * sum(fc.lora_B[j, k] * fc.lora_A[k, i] for k in range(3))
    torch.testing.assert_close(dense_change(model), want.detach(), atol=1e-10, rtol=0)
    assert torch.linalg.matrix_rank(want) > 3
