"""What a page sees: dtypes, products and norms of a layer, whatever it stores."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.core import registry
from lora_lite.runtime.layers.norm import read_norm
from lora_lite.runtime.layers.read import read_weight
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import FakeQuantLinear, toy

SEEN: list[dict] = []


@pytest.fixture(autouse=True)
def _looking(monkeypatch):
    """A method that notes what it sees in forward."""
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    SEEN.clear()

    @ll.register
    class Looking(ll.Variant):
        name = "looking"

        @staticmethod
        def param_specs(d_in, d_out, cfg):
            return {"lora_a": ll.ParamSpec((2, d_in), init="normal")}

        @staticmethod
        def forward(layer, x, y):
            a = layer.lora_a
            SEEN.append(
                {
                    "dtypes": (a.dtype, layer.tiny("lora_a").dtype, layer.master("lora_a").dtype),
                    "product": layer.project(a),
                    "rows": layer.row_norms(),
                    "columns": layer.column_norms(),
                    "a": a.detach(),
                }
            )
            return y + 0 * a.sum()


def seen(layer, dtype, store="float32"):
    ll.attach(layer, ll.AdapterConfig(variant="looking", dtype=store))
    layer(torch.zeros(3, layer.in_features, dtype=dtype))
    return SEEN[-1]


@pytest.mark.parametrize(
    ("base", "store", "want"),
    [
        ("bfloat16", "float32", ("bfloat16", "float32", "float32")),
        ("bfloat16", "bfloat16", ("bfloat16", "float32", "bfloat16")),
        ("float32", "bfloat16", ("float32", "float32", "bfloat16")),
        ("float64", "float32", ("float64", "float64", "float32")),
    ],
)
def test_dtypes(base, store, want):
    dtype = getattr(torch, base)
    assert seen(nn.Linear(5, 4).to(dtype), dtype, store)["dtypes"] == tuple(getattr(torch, name) for name in want)


@pytest.mark.parametrize("kind", [nn.Linear, FakeQuantLinear])
def test_products_and_norms(kind):
    """With a bias that would bury the product in its digits."""
    torch.manual_seed(0)
    layer = kind(7, 5)
    layer.bias.data.fill_(1000.0)
    w = layer.dequantised() if kind is FakeQuantLinear else layer.weight
    found = seen(layer, torch.float32)
    torch.testing.assert_close(found["product"], found["a"] @ w.mT, atol=2e-6 if kind is nn.Linear else 2e-5, rtol=0)
    torch.testing.assert_close(found["rows"], w.norm(dim=1))
    torch.testing.assert_close(found["columns"], w.norm(dim=0))


class Doubled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x):
        return 2 * nn.functional.linear(x, self.weight) + (0 if self.bias is None else self.bias)


def test_a_layer_is_what_it_does_not_what_it_stores():
    torch.manual_seed(0)
    layer = Doubled(7, 5)
    torch.testing.assert_close(read_weight(layer, "it"), 2 * layer.weight)
    found = seen(layer, torch.float32)
    torch.testing.assert_close(found["rows"], 2 * layer.weight.norm(dim=1))
    torch.testing.assert_close(found["product"], 2 * found["a"] @ layer.weight.mT)


def test_handles_train_what_is_trained_and_nothing_else():
    model = toy()
    handle = ll.attach(model, ll.PiSSAConfig(r=2, alpha=5))
    for value in (False, True):
        handle.trainable = value
        flags = {n.rpartition(".")[2]: t.requires_grad for n, t in model.state_dict(keep_vars=True).items()}
        assert {k: v for k, v in flags.items() if k.startswith("lora_")} == {
            "lora_A": value, "lora_B": value, "lora_A0": False, "lora_B0": False
        }  # fmt: skip


def test_one_of_two_adapters_that_rewrite_the_input_goes():
    model, x = toy(), torch.randn(3, 12)
    for name in ("a", "b"):
        ll.attach(model, ll.IA3FFConfig(), name=name)
        for t in ll.adapters(model)[name].parameters():
            t.data.fill_(0.5)
    ll.activate(model, "a")
    want = model(x)
    ll.detach(model, "b")
    torch.testing.assert_close(model(x), want)
    with ll.active(model, None):
        assert not torch.allclose(model(x), want)


class Off(nn.Module):
    """An RMS norm that says another eps than it uses; it shows on small inputs only."""

    def __init__(self, used=1e-5):
        super().__init__()
        self.weight, self.variance_epsilon, self.used = nn.Parameter(torch.ones(8)), 1e-6, used

    def forward(self, x):
        return nn.functional.rms_norm(x, (8,), self.weight, self.used)


Off.__name__ = "OffNorm"


def test_the_eps_of_a_norm_is_tried():
    assert read_norm(Off(used=1e-6), "it").eps == 1e-6
    with pytest.raises(ll.TargetError, match="it: this OffNorm computes something else"):
        read_norm(Off(), "it")


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
def test_a_convolution_of_the_update_pads_as_the_base_does(mode):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), padding_mode=mode).double()
    model, x = nn.Sequential(layer), torch.randn(2, 3, 9, 8, dtype=torch.float64)
    ll.attach(model, ll.LoRAConfig(r=2, alpha=5, dtype="float64", target_kinds=("conv",)))
    randomise(model)
    y = model(x)
    with torch.no_grad(), ll.active(model, None):
        layer.weight += 5 / 2 * (layer.lora_B @ layer.lora_A).view_as(layer.weight)
        torch.testing.assert_close(y, model(x))
