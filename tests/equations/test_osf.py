"""OSF against the sum of the weight's triplets, in every shape of a weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from equations.helpers import adapted, randomise


@pytest.mark.parametrize(("d_in", "d_out"), [(20, 12), (12, 20), (16, 16)])
def test_small_triplets_move_off_the_large_ones(d_in, d_out):
    model, fc, x = adapted(ll.OSFConfig(r=5, alpha=3, dtype="float64"), d_in, d_out)
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    randomise(model)
    U, S, Vh = torch.linalg.svd(fc.weight, full_matrices=False)
    U_h, V_h, n = U[:, :-5], Vh[:-5], min(d_in, d_out) - 5
    U_l, dU, V_l, dV, dS = (getattr(fc, f"lora_{k}") for k in ("U0", "U", "V0", "V", "S"))
    torch.testing.assert_close((U[:, n:].mT @ U_l).abs(), torch.eye(5).double(), atol=1e-9, rtol=0)
    new_U = U_l + (torch.eye(d_out) - U_h @ U_h.mT).double() @ dU
    new_V = V_l + dV @ (torch.eye(d_in).double() - V_h.mT @ V_h)
    change = new_U @ torch.diag(S[n:] + dS) @ new_V - U_l @ torch.diag(S[n:]) @ V_l
    torch.testing.assert_close(model(x), nn.functional.linear(x, fc.weight + change, fc.bias), atol=1e-9, rtol=0)
    assert (model(x) - y).abs().max() > 0.1
