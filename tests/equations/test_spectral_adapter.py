"""The spectral adapter against the paper's product."""

from __future__ import annotations

import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise


def test_forward_and_factors():
    model, fc, x = adapted(ll.SpectralAdapterConfig(r=4, dtype="float64"))
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    U, S, V = fc.lora_U, fc.lora_S, fc.lora_V.mT
    torch.testing.assert_close(S, torch.linalg.svdvals(fc.weight)[:4])
    torch.testing.assert_close(fc.weight @ V, U * S, atol=1e-10, rtol=0)
    randomise(model)
    dU, dV = fc.lora_dU.detach(), fc.lora_dV.detach().mT
    want = (U + dU) @ S.diag() @ (V + dV).mT - U @ S.diag() @ V.mT
    torch.testing.assert_close(dense_change(model), want, atol=1e-10, rtol=0)
    ll.activate(model, None)
    ll.combine(model, {"default": 0.5}, name="half")
    torch.testing.assert_close(dense_change(model), 0.5 * want, atol=1e-10, rtol=0)
