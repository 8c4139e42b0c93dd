"""Weight-only quantised layers of torchao, optimum-quanto and HQQ, through the same probing: no line of the library
names them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.testing.case import randomise

D, H = 64, 128


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x):
        return self.b(self.a(x).tanh())


def torchao(net, bits):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    return net


def quanto(net, bits):
    q = pytest.importorskip("optimum.quanto")
    q.quantize(net, weights=q.qint8 if bits == 8 else q.qint4)
    q.freeze(net)
    return net


def hqq(net, bits):
    q = pytest.importorskip("hqq.core.quantize")
    config = q.BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    for name in ("a", "b"):
        setattr(net, name, q.HQQLinear(getattr(net, name), config, compute_dtype=torch.float32, device="cpu"))
    return net


BACKENDS = [
    pytest.param(f, bits, marks=pytest.mark.optional_backend(module), id=f"{f.__name__}-{bits}")
    for f, module, widths in (
        (torchao, "torchao", (8,)),
        (quanto, "optimum.quanto", (8, 4)),
        (hqq, "hqq", (8, 4)),
    )
    for bits in widths
]
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # theirs
    pytest.mark.parametrize(("backend", "bits"), BACKENDS),
]


def nets(backend, bits):
    """A quantised network, and a dense one with the weights that it multiplies with."""
    torch.manual_seed(0)
    net = backend(Net().requires_grad_(False), bits).eval()
    twin = Net().requires_grad_(False).eval()
    with torch.no_grad():
        for name in ("a", "b"):
            layer, own = getattr(net, name), getattr(twin, name)
            bias = layer(torch.zeros(1, own.in_features))[0]
            own.bias.copy_(bias)
            own.weight.copy_((layer(torch.eye(own.in_features)) - bias).T)
    assert not torch.equal(twin.a.weight, Net().a.weight)
    return net, twin


def x():
    return torch.randn(5, D, generator=torch.Generator().manual_seed(2))


METHODS = [v for v in ll.variants() if v.trains and v.site == "linear" and not v.needs_data]


@pytest.mark.parametrize("variant", METHODS, ids=lambda v: v.name)
def test_every_method(backend, bits, variant, tmp_path):
    """Output and gradients equal those on the dequantised weights; merge reports its error; the bits come back; the
    file too."""
    net, twin = nets(backend, bits)
    base = net(x())
    fields = {"variant": variant.name, "target_kinds": ("linear",), "target_names": ("a", "b")}
    if variant.needs_weight:
        with pytest.raises(ll.WeightError, match="dequantize=True"):
            ll.attach(net, variant.config(**fields))
        fields["dequantize"] = True
    ll.attach(net, variant.config(**fields))
    if variant.exact_identity:
        assert torch.equal(net(x()), base)
    randomise(net, seed=3, scale=0.05)
    ll.attach(twin, variant.config(**fields))
    ll.load_adapter_state_dict(twin, "default", ll.adapter_state_dict(net))
    results = []
    for model in (net, twin):
        inputs = x().requires_grad_()
        y = model.train()(inputs)
        y.square().sum().backward()
        model.eval()
        own = ll.adapters(model)["default"].parameters()
        results.append([y.detach(), inputs.grad, *(p.grad for p in own if p.grad is not None)])
    assert (results[0][0] - base).abs().max() > 1e-4
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3 * float(b.abs().max()) + 1e-6, rtol=0)
    if variant.on_step is None:
        ll.save(net, tmp_path / "a.safetensors")
        other = nets(backend, bits)[0]
        ll.load(other, tmp_path / "a.safetensors")
        torch.testing.assert_close(other(x()), net(x()), atol=1e-6, rtol=0)
    with pytest.raises(ll.WeightError, match="dequantize=True"):
        ll.merge(net)
    want = net(x())
    report = ll.merge(net, dequantize=True, check=x())
    assert sorted(report.dequantised) == ["a", "b"] and report.logit_error < 1e-3 * report.logit_scale
    ll.unmerge(net)
    assert torch.equal(net(x()), want)
    ll.detach(net)
    assert torch.equal(net(x()), base)


def test_rows_and_reference_weights(backend, bits, tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    full = Net().requires_grad_(False)
    save_file(dict(full.state_dict()), tmp_path / "full.safetensors")
    net = backend(copy.deepcopy(full), bits).train()
    errors = [float((net(x()) - full(x())).norm())]
    for r in (8, 64):
        ll.attach(net, ll.LoRAConfig(r=r, alpha=2 * r), name=f"r{r}", reference_weights=tmp_path / "full.safetensors")
        errors.append(float((net(x()) - full(x())).norm()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05 * errors[0] + 1e-4
    with ll.rows(net, ["r8", None, "r64", "r8", None]):
        mixed = net(x())
    for i, name in enumerate(["r8", None, "r64", "r8", None]):
        with ll.active(net, name):
            torch.testing.assert_close(mixed[i], net(x())[i], atol=1e-5, rtol=1e-5)
