"""Methods that learn from data and never read the weight start on a 4-bit base as well."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.core.errors import WeightError


def model_and_data():
    import bitsandbytes as bnb

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32, bias=False))
    for i in (0, 2):
        dense = model[i]
        model[i] = bnb.nn.Linear4bit(
            dense.in_features,
            dense.out_features,
            bias=dense.bias is not None,
            quant_type="nf4",
            compute_dtype=torch.float32,
        )
        model[i].load_state_dict(dense.state_dict())
    model = model.to("cpu")
    with torch.no_grad():
        model(torch.randn(2, 64))
    forward = model.forward
    model.forward = lambda x: type("Out", (), {"loss": (y := forward(x)).square().mean(), "logits": y})()
    return model, [torch.randn(40, 64) for _ in range(2)]


@pytest.mark.parametrize("config", [ll.EVAConfig, ll.LoRAGAConfig, ll.LoRAOneConfig])
def test_start_on_nf4(config):
    model, data = model_and_data()
    packed, y = model[0].weight.detach().clone(), model(data[0])
    handle = ll.attach(model, config(r=4, alpha=6), data)
    assert torch.equal(model[0].weight, packed)
    if config is ll.LoRAOneConfig:
        assert model(data[0]).loss < y.loss
    else:
        assert torch.equal(model(data[0]).logits, y.logits)
    model(data[0]).loss.backward()
    assert any(p.grad.abs().max() > 0 for p in handle.parameters())


def test_corda_asks_before_it_reads():
    model, data = model_and_data()
    with pytest.raises(WeightError, match="dequantize=True"):
        ll.attach(model, ll.CorDAConfig(r=4), data)
    y = model(data[0]).logits
    ll.attach(model, ll.CorDAConfig(r=4, dequantize=True), data)
    assert torch.equal(model(data[0]).logits, y)
