"""GraLoRA against its blocks, one by one."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise

ALPHA = 7.0


@pytest.mark.parametrize(("k", "r", "general"), [(2, 4, 0), (4, 4, 0), (2, 6, 3), (1, 3, 0)])
def test_forward_and_factors(k, r, general):
    model, fc, x = adapted(ll.GraLoRAConfig(r=r, alpha=ALPHA, k=k, general=general, dtype="float64"))
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    randomise(model)
    m, n, g = 12 // k, 20 // k, r // k
    want = torch.zeros(12, 20).double()
    for j in range(k):
        for i in range(k):
            B, A = fc.lora_B[j][:, i * g : (i + 1) * g], fc.lora_A[i][j * g : (j + 1) * g]
            want[j * m : (j + 1) * m, i * n : (i + 1) * n] = B @ A
    if general:
        want += fc.lora_B_general @ fc.lora_A_general
    want = ALPHA / (r + general) * want
    torch.testing.assert_close(dense_change(model), want.detach(), atol=1e-10, rtol=0)
    ll.activate(model, None)
    ll.combine(model, {"default": 0.5}, name="half")  # reads the factors
    torch.testing.assert_close(dense_change(model), 0.5 * want.detach(), atol=1e-10, rtol=0)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ll.TargetError, match="k=3 does not divide"):
        adapted(ll.GraLoRAConfig(r=6, k=3))
    with pytest.raises(ll.ConfigError, match="divides r"):
        ll.GraLoRAConfig(r=5, k=2)
