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
    sign = (U[:, n:].mT @ fc.lora_U0).diagonal().sign()
    assert torch.allclose(U[:, n:] * sign, fc.lora_U0, atol=1e-9)
    new_U = fc.lora_U0 + (torch.eye(d_out) - U_h @ U_h.mT).double() @ fc.lora_U
    new_V = fc.lora_V0 + fc.lora_V @ (torch.eye(d_in).double() - V_h.mT @ V_h)
    change = new_U @ torch.diag(S[n:] + fc.lora_S) @ new_V - fc.lora_U0 @ torch.diag(S[n:]) @ fc.lora_V0
    torch.testing.assert_close(model(x), nn.functional.linear(x, fc.weight + change, fc.bias), atol=1e-9, rtol=0)
    assert (model(x) - y).abs().max() > 0.1
