"""Pages that say what becomes of the weight: one product with W', and the same function where that cannot be."""

from __future__ import annotations

import copy
import threading
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lora_lite as ll
from lora_lite.core import registry
from lora_lite.runtime.call import stand_in
from lora_lite.runtime.model.state import SITE
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import Conv1D, FakeQuantLinear, Snapshot, toy

HIRA, LORA = ll.HiRAConfig(r=3), ll.LoRAConfig(r=3, alpha=7)


def x(*shape):
    return torch.randn(*(shape or (3, 5)), 12, generator=torch.Generator().manual_seed(2))


def adapted(kind=nn.Linear, dtype=torch.float32, **cfgs):
    model = toy(kind=kind, dtype=dtype)
    for i, (name, cfg) in enumerate((cfgs or {"default": HIRA}).items()):
        ll.attach(model, cfg, name=name)
        randomise(model, name, seed=i)
    ll.activate(model, list(cfgs) or "default")
    return model


def additive(monkeypatch):
    """From here on every page acts by its `forward`."""
    monkeypatch.setattr(stand_in, "EXACT", ())


def products(model, v):
    with FlopCounterMode(display=False) as count, torch.no_grad():
        model(v)
    return count.get_total_flops()


def test_a_layer_multiplies_once(monkeypatch):
    model, v = adapted(), x(64)
    with ll.active(model, None):
        bare = products(model, v)
    own = 4 * 2 * 3 * 12 * 20  # B A on each of four layers
    assert products(model, v) == bare + own
    additive(monkeypatch)
    assert products(model, v) == 2 * bare + own


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize(
    "selection", [{"a": 1}, {"a": 0.4}, {"a": 1, "b": -0.7}, {"lora": 1, "a": 1}, {"a": 0.5, "lora": 2, "b": 1}]
)
def test_the_function_is_that_of_the_forward(kind, selection, monkeypatch):
    model = adapted(kind, a=HIRA, lora=LORA, b=ll.HiRAConfig(r=2, seed=1))
    ll.activate(model, selection)
    v = x().requires_grad_()
    leaves = [v, *(p for n in selection for p in ll.adapters(model)[n].parameters())]
    y = model(v)
    got = torch.autograd.grad(y.square().sum(), leaves)
    additive(monkeypatch)
    z = model(v)
    want = torch.autograd.grad(z.square().sum(), leaves)
    torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_behind_a_page_that_changed_y_the_weight_stays():
    seen = []
    for model in (adapted(lora=LORA, a=HIRA), adapted(a=HIRA, lora=LORA)):
        model.layers[0].up.register_forward_pre_hook(lambda m, args: seen.append(m.weight is m._parameters["weight"]))
        model(x())
    assert seen == [True, False]


def test_the_stored_weight_comes_back_after_an_error_and_after_an_interruption(monkeypatch):
    model = adapted()
    before, layer = Snapshot(model, x()), model.layers[0].up
    with pytest.raises(RuntimeError):
        layer(x()[..., :7])
    assert not (d := before.difference(model)), d

    def interrupted(*_):
        raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(x())
    handle.remove()
    W = layer._parameters["weight"]
    assert layer.weight is not W  # torch runs no hook then
    fresh = copy.deepcopy(before)
    y = model(x())
    assert layer.weight is W and not (d := fresh.difference(model)), d
    ll.merge(model, check=x())
    torch.testing.assert_close(model(x()), y, atol=1e-5, rtol=1e-5)


def test_a_layer_that_returns_nothing_is_named_as_before():
    model = adapted()
    model.layers[0].up.forward = lambda v: None
    with pytest.raises(ll.SelectionError, match="layers.0.up.*NoneType"):
        model(x())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    model, v = adapted(), x().requires_grad_()
    leaves = [v, *ll.adapters(model)["default"].parameters()]
    want = torch.autograd.grad(model(v).square().sum(), leaves)
    y = v
    for block in model.layers:
        y = checkpoint(block, y, use_reentrant=reentrant)
    y.square().sum().backward()
    for a, b in zip((leaf.grad for leaf in leaves), want, strict=True):
        assert torch.equal(a, b)
    assert "weight" not in model.layers[0].up.__dict__


def test_rows_of_several_adapters():
    model = adapted(a=HIRA, b=ll.HiRAConfig(r=2, seed=1))
    with ll.rows(model, ["a", None, "b"]):
        y = model(x())
    for i, name in enumerate(("a", None, "b")):
        with ll.active(model, name):
            torch.testing.assert_close(y[i], model(x())[i], atol=1e-5, rtol=1e-5)


def test_a_quantised_base():
    with pytest.raises(ll.WeightError, match="dequantize=True"):
        ll.attach(toy(kind=FakeQuantLinear), HIRA)
    model = toy(kind=FakeQuantLinear)
    ll.attach(model, ll.HiRAConfig(r=3, dequantize=True))
    randomise(model)
    layer = model.layers[0].up
    W = layer.dequantised()
    want = nn.functional.linear(x(), W * (1 + layer.lora_B @ layer.lora_A), layer.bias)
    torch.testing.assert_close(layer(x()), want, atol=1e-5, rtol=1e-5)


def test_16_bit_and_autocast_keep_small_changes():
    """W + ΔW would round to a bf16 weight, which is coarser than ΔW."""
    seen = []
    for model, cast in ((adapted(dtype=torch.bfloat16), False), (adapted(), True), (adapted(), False)):
        model.layers[0].up.register_forward_pre_hook(lambda m, args: seen.append("weight" in m.__dict__))
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            model(x().to(model.head.weight.dtype))
    assert seen == [False, False, True]


def test_threads_take_turns():
    model, errors = adapted(), []
    want = model(x())

    def work():
        for _ in range(10):
            if not torch.equal(model(x()), want):
                errors.append("another function")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors


def test_the_plan_says_what_is_built():
    assert "adapted weight is built in every call (up to 0.9 KiB in fp32)" in str(ll.plan(toy(), HIRA))
    assert "adapted weight" not in str(ll.plan(toy(), LORA))


class Shifted(ll.Variant):
    """y' = y + (Σ x) v, and W' = W + v 1ᵀ."""

    name = "shifted_in_two_forms"

    @staticmethod
    def param_specs(d_in, d_out, cfg):
        return {"lora_v": ll.ParamSpec((d_out,))}

    @staticmethod
    def forward(layer, x, y):
        return y + layer.dropout(x).sum(-1, keepdim=True) * layer.lora_v

    @staticmethod
    def weight(layer, W):
        return W + layer.lora_v[:, None]


def test_one_function_in_two_forms(monkeypatch):
    """W' while gradients are taken, and the page's forward where it drops inputs or not."""
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    ll.register(Shifted)
    model = toy().train()
    ll.attach(model, ll.AdapterConfig(variant=Shifted.name, dropout=0.0))
    randomise(model)
    seen = []
    model.layers[0].up.register_forward_pre_hook(lambda m, args: seen.append("weight" in m.__dict__))
    x = torch.randn(3, 5, 12)
    with_gradient = model(x)
    with torch.no_grad():
        without = model(x)
    torch.testing.assert_close(with_gradient, without, atol=1e-5, rtol=1e-5)
    ll.detach(model)
    ll.attach(model, ll.AdapterConfig(variant=Shifted.name, dropout=0.5))
    model(x)
    assert seen == [True, False, False]


class Cache:
    """What a model continues while it generates."""

    def get_seq_length(self):
        return 1


class Generates(nn.Module):
    config: ClassVar = {"model_type": "generates"}

    def __init__(self):
        super().__init__()
        self.inner = toy()

    def forward(self, x, past_key_values=None):
        return self.inner(x)


def test_a_weight_is_made_once_per_generation(monkeypatch):
    model, v = Generates().eval(), x(2)
    ll.attach(model, HIRA)
    randomise(model)
    calls, page = [], ll.get_variant("hira").weight
    for layer in model.modules():
        if SITE in layer.__dict__:
            layer.__dict__[SITE].slots["default"].weight = lambda view, W: (calls.append(view.path), page(view, W))[1]
    cache, want = Cache(), model(v).detach()
    del calls[:]
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(v, past_key_values=cache), want)
        assert len(calls) == len(set(calls)) == 4
        model.inner.layers[0].up.lora_A.mul_(2)
        changed = model(v, past_key_values=cache)
        assert len(calls) == 5 and not torch.allclose(changed, want)
        model.inner.layers[0].up.weight.mul_(2)
        assert not torch.allclose(model(v, past_key_values=cache), changed) and len(calls) == 6
