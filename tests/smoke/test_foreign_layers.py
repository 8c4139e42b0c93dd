"""Layers of other libraries: bitsandbytes' packed weights, transformers' Conv1D, accelerate's offloaded ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
import tiny_models
from lora_lite.runtime.layers import linear, read
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import FakeQuantLinear, Snapshot
from neighbours import fp4_on_cpu

CFG = ll.LoRAConfig(r=3, alpha=7)


class Two(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.a, self.b = layers

    def forward(self, x):
        return self.b(self.a(x).tanh())


def quantised(kind, bias=True):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layers, dense = [], []
    for d_in, d_out in ((64, 128), (128, 64)):
        plain = nn.Linear(d_in, d_out, bias=bias)
        if kind == "int8":
            layer = bnb.nn.Linear8bitLt(d_in, d_out, bias=bias, has_fp16_weights=False, threshold=6.0)
            layer.weight = bnb.nn.Int8Params(plain.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(d_in, d_out, bias=bias, compute_dtype=torch.float32, quant_type=kind)
            layer.weight = bnb.nn.Params4bit(plain.weight.data.clone(), requires_grad=False, quant_type=kind)
        if bias:
            layer.bias = nn.Parameter(plain.bias.data.clone())
        layer = layer.to("cpu")
        layers.append(layer)
        if kind != "int8":
            dense.append(bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float())
        else:
            state = layer.weight
            dense.append(bnb.functional.int8_vectorwise_dequant(state.data, state.SCB).float())
    return Two(*layers), dense


def x(d=64):
    return torch.randn(5, d, generator=torch.Generator().manual_seed(2))


def exact(model):
    """The output on the path that is used in training: for a CPU input without gradient bitsandbytes repacks its weight
    and computes in bf16."""
    return model(x().requires_grad_()).detach()


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")  # bitsandbytes 0.46
@pytest.mark.optional_backend("bitsandbytes")
@pytest.mark.parametrize("kind", ["nf4", pytest.param("fp4", marks=fp4_on_cpu), "int8"])
@pytest.mark.parametrize("bias", [True, False])
def test_bitsandbytes(kind, bias, tmp_path):
    model, dense = quantised(kind, bias)
    base, tolerance = exact(model), 1e-5 if kind != "int8" else 2e-2
    for layer, w in zip((model.a, model.b), dense, strict=True):
        assert read.is_quantised(layer) and not read.is_plain(layer)
        # int8 kernels round the activations too: probing with the identity is exact for the weight up to that
        torch.testing.assert_close(read.read_weight(layer, "a"), w, atol=2e-6 if kind != "int8" else 2e-3, rtol=0)
    packed = model.a.weight.data.clone()
    plan = ll.plan(model, CFG)
    assert plan.base_params == 2 * 64 * 128 + bias * 192 and "quantised" in str(plan)
    ll.attach(model, CFG)
    assert torch.equal(exact(model), base)
    randomise(model)
    v = x().requires_grad_()
    y = model(v)
    y.square().sum().backward()
    assert ll.check(model).learning == {"default": 2} and v.grad.any() and y.dtype == base.dtype
    y = y.detach()
    path = ll.save(model, tmp_path / "x")
    with pytest.raises(ll.WeightError, match="dequantize=True"):
        ll.merge(model)
    deltas = [7 / 3 * layer.lora_B.detach() @ layer.lora_A.detach() for layer in (model.a, model.b)]
    report = ll.merge(model, dequantize=True)
    assert report.dequantised == ["a", "b"]
    for layer, w, dW in zip((model.a, model.b), dense, deltas, strict=True):
        torch.testing.assert_close(layer.weight, w + dW, atol=2e-6 if kind != "int8" else 2e-3, rtol=1e-5)
    assert float((exact(model) - y).abs().max() / y.abs().max()) < tolerance
    ll.unmerge(model)
    assert torch.equal(exact(model), y)
    ll.detach(model)
    assert torch.equal(exact(model), base) and torch.equal(model.a.weight.data, packed), "the packed weight changed"
    ll.load(model, path)
    assert torch.equal(exact(model), y)
    report = ll.merge(model, dequantize=True, check=x())
    assert report.logit_error < 0.02 * report.logit_scale and report.effect > 0.1 * report.logit_scale


@pytest.mark.optional_backend("bitsandbytes")
@pytest.mark.parametrize("cfg", [ll.OLoRAConfig(r=3, alpha=7), ll.PiSSAConfig(r=3, alpha=7)], ids=lambda c: c.variant)
def test_methods_that_read_the_weight_ask_first(cfg):
    model, _ = quantised("nf4")
    n = len(list(model.parameters()))
    with pytest.raises(ll.WeightError, match="a: .*dequantize=True"):
        ll.attach(model, cfg)
    assert len(list(model.parameters())) == n
    base = exact(model)
    ll.attach(model, type(cfg)(**{**cfg.to_dict(), "dequantize": True}))
    assert torch.equal(exact(model), base)
    randomise(model)
    y = exact(model)
    ll.merge(model, dequantize=True)
    assert float((exact(model) - y).abs().max() / y.abs().max()) < 1e-5


def test_fake_quantised_layers_are_read_exactly():
    for bias in (True, False):
        layer = FakeQuantLinear(12, 20, bias)
        if bias:
            layer.bias.data.mul_(1e4)  # a large bias costs the weight no digits
        assert torch.equal(read.read_weight(layer, ""), layer.dequantised())
        assert read.is_quantised(layer) and linear.dims(layer) == (12, 20)
        v = torch.randn(3, 12)
        torch.testing.assert_close(linear.apply_linear(layer, v), v @ layer.dequantised().mT)


def test_a_wide_layer_is_probed_in_pieces():
    layer = FakeQuantLinear(2 * linear.COLUMNS + 7, 5)
    assert torch.equal(read.read_weight(layer, ""), layer.dequantised())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_conv1d_merges(dtype):
    model, batch = tiny_models.build("gpt2").to(dtype), tiny_models.batch("gpt2")
    bare = Snapshot(model)
    handle = ll.attach(model, ll.DoRAConfig(r=3, alpha=7))
    randomise(model, scale=0.1)
    with torch.no_grad():
        y = model(**batch).logits
        report = ll.merge(model, check=batch)
        merged = model(**batch).logits
        ll.unmerge(model)
        assert torch.equal(model(**batch).logits, y)
    error = float((merged - y).abs().max() / y.abs().max())
    assert report.n_layers == len(handle.targets) == 8 and error < (1e-5 if dtype == torch.float32 else 0.05)
    assert report.effect > 1e-3 * report.logit_scale
    ll.detach(model)
    assert not (d := bare.difference(model)), d


def offloaded(model):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def test_attaching_after_offload_raises():
    model = offloaded(tiny_models.build("llama"))
    with pytest.raises(ll.LoraLiteError, match="meta.*offload"):
        ll.attach(model, CFG)


def test_offloading_after_attach_is_right():
    """accelerate puts a layer's own parameters back on meta before forward hooks run: that gave NaN without a word."""
    model, batch = tiny_models.build("llama"), tiny_models.batch("llama")
    ll.attach(model, CFG)
    randomise(model)
    with torch.no_grad():
        want = model(**batch).logits
        model = offloaded(model)
        assert torch.equal(model(**batch).logits, want)


def test_device_map_of_one_device_is_harmless():
    accelerate = pytest.importorskip("accelerate")
    model, batch = tiny_models.build("llama"), tiny_models.batch("llama")
    ll.attach(model, CFG)
    randomise(model)
    with torch.no_grad():
        want = model(**batch).logits
        got = accelerate.dispatch_model(model, {"": "cpu"})(**batch).logits
    assert torch.equal(got, want)


def test_exact_wrapping_of_forward_is_no_obstacle():
    """accelerate and others replace `forward` on the instance."""
    layer = nn.Linear(12, 20)
    original = layer.forward
    layer.forward = lambda v: 2 * original(v)
    model = nn.Sequential(layer)
    ll.attach(model, CFG)
    randomise(model)
    v = torch.randn(4, 12)
    want = 2 * (v @ layer.weight.mT + layer.bias) + 7 / 3 * (v @ layer.lora_A.mT) @ layer.lora_B.mT
    torch.testing.assert_close(model(v), want)


class Packed(torch.Tensor):
    """A weight-only quantised parameter as torchao makes them: a tensor subclass without memory of its own, on an
    ordinary nn.Linear."""

    @staticmethod
    def __new__(cls, codes, scale):
        t = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device="cpu")
        t.codes, t.scale = codes, scale
        return t

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Packed(args[0].codes, args[0].scale)
        dense = [a.codes.float() * a.scale if isinstance(a, Packed) else a for a in args]
        return func(*dense, **(kwargs or {}))


def test_packed_parameters_without_an_address_are_not_taken_for_tied_ones():
    torch.manual_seed(0)
    layers = [nn.Linear(64, 128), nn.Linear(128, 64)]
    for layer in layers:
        scale = layer.weight.detach().abs().max() / 127
        layer.weight = nn.Parameter(Packed((layer.weight.detach() / scale).round(), scale), requires_grad=False)
    model = Two(*layers)
    assert model.a.weight.data_ptr() == model.b.weight.data_ptr() == 0
    ll.attach(model, ll.LoRAConfig(r=3, alpha=7, target_names=("a", "b")))
    randomise(model)
    want = model(x()).detach()
    with pytest.raises(ll.WeightError, match="dequantize=True"):
        ll.merge(model)
    assert ll.merge(model, dequantize=True).dequantised == ["a", "b"]
    torch.testing.assert_close(model(x()), want, atol=1e-5, rtol=1e-5)
    ll.unmerge(model)
    assert torch.equal(model(x()), want)
