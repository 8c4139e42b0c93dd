"""Merging of layers wider than one block of columns, and of models that are training."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lora_lite as ll
from lora_lite.runtime.view import folded
from lora_lite.testing.case import randomise


@pytest.mark.parametrize("method", ["lora", "ia3", "oft", "ether_plus", "token_rows"])
@pytest.mark.parametrize("shape", [(2100, 3), (3, 2100)])
def test_wide_layers(method, shape, monkeypatch):
    """More numbers than a block holds, whichever way a method is read off; the weight, not what a page makes of it."""
    monkeypatch.setattr(folded, "SMALL", 1000)
    monkeypatch.setattr(folded, "LARGE", 2500)
    torch.manual_seed(0)
    variant = ll.get_variant(method)
    model = nn.Sequential(nn.Linear(*shape)).double()
    ll.attach(model, variant.config(variant=method, dtype="float64", target_kinds=("linear",)))
    randomise(model)
    x = torch.randn(4, shape[0], dtype=torch.float64)
    want = model(x)
    report = ll.merge(model)
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-9)
    W = model[0].weight.detach().clone()
    ll.unmerge(model)
    assert report.change["0"] == pytest.approx(float((W - model[0].weight).norm() / model[0].weight.norm()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 0.4, "b": 1.0}])
def test_rows_apart(weights, bias, monkeypatch):
    """Pages of features take rows of the weight in blocks that hold whole groups: bitwise what columns give."""
    monkeypatch.setattr(folded, "SMALL", 30)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 90, bias=bias))
    for name, cfg in (("a", ll.RoadConfig(group_size=8, per_pair=4)), ("b", ll.IA3Config()), ("c", ll.BitFitConfig())):
        if name != "c" or bias:
            ll.attach(model, cfg, name=name)
            randomise(model, name)
    ll.activate(model, weights | ({"c": 0.7} if bias else {}))
    seen = []
    by_rows = folded._by_rows
    monkeypatch.setattr(folded, "_by_rows", lambda f, w, dtype, n: seen.append(n) or by_rows(f, w, dtype, n))
    ll.merge(model)
    W = model[0].weight.detach().clone()
    assert seen == [8], "4 rows, doubled until no pair of outputs is torn; the last block is a short one"
    ll.unmerge(model)
    monkeypatch.setattr(folded, "_rows_apart", lambda *a: 0)
    ll.merge(model)
    assert torch.equal(model[0].weight, W)


def test_a_large_vocabulary(monkeypatch):
    monkeypatch.setattr(folded, "SMALL", 1000)
    monkeypatch.setattr(folded, "LARGE", 2500)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(2100, 3)).double()
    for name, cfg in (("a", ll.LoRAConfig(r=2, alpha=5)), ("b", ll.RoadConfig())):
        ll.attach(model, dataclasses.replace(cfg, dtype="float64", target_kinds=("embedding",)), name=name)
        randomise(model, name)
    ids = torch.tensor([0, 1023, 1024, 2099])
    for chosen in ("a", ["a", "b"]):
        ll.activate(model, chosen)
        want = model(ids)
        ll.merge(model)
        torch.testing.assert_close(model(ids), want, rtol=0, atol=1e-10)
        ll.unmerge(model)


def test_the_base_is_multiplied_with_nothing(monkeypatch):
    """Its product with the identity is the weight."""
    torch.manual_seed(0)
    for method in ("lora", "dora", "ia3", "oft", "hra", "boft"):
        variant = ll.get_variant(method)
        model = nn.Sequential(nn.Linear(256, 256))
        ll.attach(model, variant.config(variant=method))
        randomise(model)
        with FlopCounterMode(display=False) as count:
            ll.merge(model)
        assert count.get_total_flops() < 256**3, method  # half of that product


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


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: (y, None), lambda y: {"logits": y, "n": 3}])
def test_training_while_merged_is_refused_in_our_words(wrap):
    """The output keeps its bits; a backward pass says which verb is missing. What was not to learn is left alone."""

    class Wrapped(nn.Sequential):
        def forward(self, x):
            return wrap(super().forward(x))

    model, x = Wrapped(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7)), torch.randn(3, 12)
    adapter = ll.attach(model, ll.LoRAConfig(r=3, alpha=5))
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    ll.merge(model)

    def out():
        y = model(x)
        if torch.is_tensor(y):
            return y
        return y["logits"] if isinstance(y, dict) else y[0]

    trained = out()
    with pytest.raises(ll.StateError, match=r"'default' is merged .* ll.unmerge\(model\) before training"):
        trained.square().mean().backward()
    model.eval()
    assert torch.equal(trained, out()) and not out().requires_grad
    model.train()
    with torch.no_grad():
        assert not out().requires_grad
    adapter.trainable = False
    assert not out().requires_grad
    adapter.trainable = True
    ll.unmerge(model)
    out().square().mean().backward()
    assert all(p.grad is not None for p in adapter.parameters())
