"""Merging of layers wider than one block of columns, and of models that are training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.testing.case import randomise


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_wide_layers(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2100, 3) if kind == "linear" else nn.Embedding(2100, 3)).double()
    ll.attach(model, ll.LoRAConfig(r=2, alpha=5, dtype="float64", target_kinds=(kind,)))
    randomise(model)
    x = torch.randn(4, 2100, dtype=torch.float64) if kind == "linear" else torch.tensor([0, 1023, 1024, 2099])
    want = model(x)
    ll.merge(model)
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-10)


def test_the_check_batch_is_run_without_dropout_and_modes_come_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Dropout(0.5), nn.Linear(20, 12)).train()
    model[2].eval()
    ll.attach(model, ll.LoRAConfig(r=2, alpha=5))
    randomise(model)
    modes = [m.training for m in model.modules()]
    report = ll.merge(model, check=torch.randn(5, 12))
    assert report.logit_error < 1e-5 < 1e-2 < report.effect
    assert [m.training for m in model.modules()] == modes


def test_a_layer_without_a_bias_keeps_no_bias_and_the_rounding_is_reported():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=False, dtype=torch.bfloat16))
    keys = list(model.state_dict())
    ll.attach(model, ll.LoRAConfig(r=2, alpha=5))
    randomise(model)
    report = ll.merge(model)
    assert [k for k in model.state_dict() if "lora_" not in k] == keys and model[0].bias is None
    assert 1e-4 < report.rounding["0"] < 2**-8
