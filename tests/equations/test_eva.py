"""EVA against the SVD of the inputs themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.core.errors import ConfigError


def model_and_data(dtype=torch.float64):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 15, bias=False), nn.Tanh(), nn.Linear(15, 7))
    data = [torch.randn(9, 20, dtype=dtype) * torch.linspace(0.1, 3, 20) for _ in range(4)]
    return model.to(dtype).eval(), data


def inputs(model, data):
    X, found = torch.cat(data), {}
    for i, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            found[str(i)] = X
        X = layer(X).detach()
    return found


def test_A_is_the_leading_right_singular_vectors_and_the_forward_is_lora():
    model, data = model_and_data()
    want = inputs(model, data)
    x = data[0]
    y = model(x)
    ll.attach(model, ll.EVAConfig(r=3, alpha=7, rho=1, dtype="float64"), data)
    assert torch.equal(model(x), y)
    for path, X in want.items():
        layer = model.get_submodule(path)
        V = torch.linalg.svd(X).Vh[:3]
        torch.testing.assert_close(layer.lora_A @ layer.lora_A.mT, torch.eye(3).double(), atol=1e-10, rtol=0)
        torch.testing.assert_close(layer.lora_A.abs(), V.abs(), atol=1e-10, rtol=0)  # each vector up to its sign
        assert (layer.lora_A.gather(1, layer.lora_A.abs().argmax(1, keepdim=True)) > 0).all()
    layer = model[0]
    nn.init.normal_(layer.lora_B)
    slow = torch.stack([layer.weight @ v + layer.bias + 7 / 3 * layer.lora_B @ (layer.lora_A @ v) for v in x])
    torch.testing.assert_close(layer(x), slow, atol=1e-10, rtol=0)


@pytest.mark.parametrize("centre", [False, True])
def test_ranks_go_where_they_explain_most(centre):
    model, data = model_and_data()
    data = [x + torch.linspace(-1, 3, 20) for x in data]
    shares = []
    for path, X in inputs(model, data).items():
        s = torch.linalg.svdvals(X - X.mean(0) * centre) ** 2
        shares += [(float(v / s.sum()), path) for v in s[:6]]
    chosen = sorted(shares, reverse=True)[:9]
    handle = ll.attach(model, ll.EVAConfig(r=3, alpha=7, rho=2, centre=centre, dtype="float64"), data)
    ranks = {path: sum(p == path for _, p in chosen) for path in "024"}
    assert len(set(ranks.values())) > 1
    assert {p: t.cfg.r for p, t in handle.record.targets.items()} == {p: r for p, r in ranks.items() if r}
    assert all(t.cfg.scale == pytest.approx(7 / 3) for t in handle.record.targets.values())
    assert sum(t.cfg.r for t in handle.record.targets.values()) == 9
    assert f"{handle.num_parameters():,} trained" in str(handle)


def test_a_target_without_a_direction_is_left_out_and_the_file_holds_the_ranks(tmp_path):
    model, data = model_and_data()
    data = [x[:, :2] @ torch.randn(2, 20).double() for x in data]  # two directions; the inputs of `flat` have forty
    flat = nn.Linear(40, 7).double()
    model = nn.ModuleDict({"a": model, "b": flat})
    model.forward = lambda x, z: (model["a"](x), model["b"](z))
    Z = torch.linalg.qr(torch.randn(40, 40).double()).Q
    batch = [(data[0], Z)]
    handle = ll.attach(model, ll.EVAConfig(r=1, rho=2, dtype="float64", target_names=("a.0", "b")), batch)
    assert handle.targets == ["a.0"] and handle.record.targets["a.0"].cfg.r == 2
    assert not hasattr(flat, "lora_A") and "left out after calibration" in str(handle)
    nn.init.normal_(model["a"][0].lora_B)
    y = model(data[0], Z)[0]
    ll.save(model, tmp_path / "x.safetensors")
    ll.detach(model)
    loaded = ll.load(model, tmp_path / "x.safetensors")
    assert torch.equal(model(data[0], Z)[0], y) and loaded.targets == ["a.0"]


def test_large_layers_agree_with_the_dense_decomposition():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(700, 5))
    X = torch.randn(900, 700) * torch.arange(1, 701) ** -0.5
    ll.attach(layer, ll.EVAConfig(r=8, rho=1), [X])
    A, V = layer[0].lora_A.double(), torch.linalg.svd(X.double(), full_matrices=False).Vh[:8]
    assert torch.linalg.svdvals(A @ V.mT).min() > 1 - 1e-6


def test_too_few_tokens_and_a_small_rho():
    model, data = model_and_data()
    with pytest.raises(ConfigError, match="has 2 tokens"):
        ll.attach(model, ll.EVAConfig(r=3), data[0][:2])
    with pytest.raises(ConfigError, match="rho"):
        ll.EVAConfig(rho=0.5)
