"""PEANuT against its network, run on one column of the weight after the other."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_forward(activation, depth):
    cfg = ll.PEANuTConfig(r=3, alpha=7, depth=depth, activation=activation, dtype="float64")
    model, fc, x = adapted(cfg)
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    randomise(model)
    f = {"relu": lambda v: v.clamp_min(0), "tanh": torch.tanh}[activation]
    columns = []
    for w in fc.weight.mT:
        h0 = f(fc.lora_A @ w)
        if depth:
            h1 = f(fc.lora_E0 @ h0)
            h2 = f(fc.lora_E1 @ h1)
            h0 = f(fc.lora_D1 @ (f(fc.lora_D0 @ h2) + h1)) + h0
        columns.append(7 / 3 * fc.lora_B @ h0)
    torch.testing.assert_close(dense_change(model), torch.stack(columns, 1).detach(), atol=1e-10, rtol=0)


def test_depth_must_not_be_negative():
    with pytest.raises(ll.ConfigError, match="depth"):
        ll.PEANuTConfig(depth=-1)
