"""IA3 against a loop over features, with one config that gates some targets on their inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from equations.helpers import adapted, randomise


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("side", ["output", "input"])
def test_forward(side, bias):
    model, fc, x = adapted(ll.IA3Config(side=side, dtype="float64"), bias=bias)
    randomise(model)
    gain = 1 + fc.lora_g
    assert gain.shape == ((12,) if side == "output" else (20,))
    b = fc.bias if bias else torch.zeros(12).double()
    if side == "output":
        want = [[gain[j] * (fc.weight[j] @ row + b[j]) for j in range(12)] for row in x]
    else:
        want = [[sum(fc.weight[j, i] * gain[i] * row[i] for i in range(20)) + b[j] for j in range(12)] for row in x]
    torch.testing.assert_close(model(x), torch.stack([torch.stack(row) for row in want]), atol=1e-10, rtol=0)


def test_sides_by_name():
    model = nn.ModuleDict(
        {"v_proj": nn.Linear(20, 12), "down_proj": nn.Linear(20, 12), "odown_proj": nn.Linear(20, 12)}
    )
    ll.attach(model, ll.IA3Config(input_names=("down_proj",)))
    assert [model[k].lora_g.numel() for k in model] == [12, 20, 12]
    x = torch.randn(3, 20)
    model["down_proj"].lora_g.data.fill_(1.0)
    torch.testing.assert_close(
        model["down_proj"](x), nn.functional.linear(2 * x, model["down_proj"].weight, model["down_proj"].bias)
    )
    ll.detach(model)
    with pytest.raises(ll.TargetError, match="input_names"):
        ll.attach(model, ll.IA3Config(input_names=("fc2",)))


@pytest.mark.parametrize("sign", [1, -1])
def test_gains_move_both_ways_on_a_bf16_base(sign):
    model, fc, x = adapted(ll.IA3Config(), dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(ll.adapters(model)["default"].param_groups(lr=1e-3))
    (sign * model(x).square().sum()).backward()
    optimizer.step()
    torch.testing.assert_close(fc.lora_g, torch.full((12,), -sign * 1e-3), atol=1e-5, rtol=0)
