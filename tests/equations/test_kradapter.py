"""KRAdapter against its rows, entry by entry."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise


@pytest.mark.parametrize(("d_in", "d_out"), [(20, 12), (12, 20), (17, 17)])
def test_forward(d_in, d_out):
    model, fc, x = adapted(ll.KRAdapterConfig(r=3, alpha=7, strength=1.5, dtype="float64"), d_in, d_out)
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    randomise(model)
    q = int(min(d_in, d_out) ** 0.5)
    assert fc.lora_U.shape == (min(d_in, d_out), q) and fc.lora_V.shape[1] * q >= max(d_in, d_out)
    assert fc.lora_V.shape[1] >= q and (fc.lora_V.shape[1] - 1) * q < max(d_in, d_out)
    want = torch.zeros(d_out, d_in).double()
    for o in range(d_out):
        for i in range(d_in):
            row, column = (i, o) if d_in < d_out else (o, i)
            want[o, i] = 1.5 * fc.lora_V[row, column // q] * fc.lora_U[row, column % q]
    torch.testing.assert_close(dense_change(model, d_in), want.detach(), atol=1e-10, rtol=0)
    assert torch.linalg.matrix_rank(want) == min(d_in, d_out)
