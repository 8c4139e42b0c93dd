"""Sums of adapters are sums of updates, not of factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll


def two() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 15, bias=False)).double().eval()
    for name, r, alpha, only in (("a", 3, 7, None), ("b", 5, 2, ("0",))):
        ll.attach(
            model,
            ll.LoRAConfig(r=r, alpha=alpha, dtype="float64", target_names=only, use_rslora=name == "b"),
            name=name,
        )
    g = torch.Generator().manual_seed(2)
    for n, p in model.named_parameters():
        if "lora_" in n:
            p.data.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.4)
    return model, torch.randn(4, 20, dtype=torch.float64, generator=g)


def delta(model: nn.Module, name: str, layer: int) -> torch.Tensor:
    """ΔW of one adapter at one layer, read off the layer's behaviour."""
    lin = model[layer]
    eye = torch.eye(lin.in_features, dtype=torch.float64)
    with torch.no_grad():
        with ll.active(model, name):
            out = lin(eye)
        with ll.active(model, None):
            return (out - lin(eye)).mT


def test_sum_is_exact_and_one_at_weight_one_is_itself():
    model, x = two()
    with ll.active(model, "a"):
        alone = model(x)
    ll.combine(model, {"a": 1.0}, name="same")
    torch.testing.assert_close(model(x), alone, atol=1e-12, rtol=0)
    ll.combine(model, {"a": 0.7, "b": -1.3}, name="ab")
    for layer in (0, 1):
        want = 0.7 * delta(model, "a", layer) - (1.3 * delta(model, "b", layer) if layer == 0 else 0)
        torch.testing.assert_close(delta(model, "ab", layer), want, atol=1e-12, rtol=0)


def test_cut_rank_is_the_best_approximation():
    model, _ = two()
    ll.combine(model, {"a": 0.7, "b": -1.3}, name="ab")
    ll.combine(model, {"a": 0.7, "b": -1.3}, name="cut", rank=4)
    full, cut = delta(model, "ab", 0), delta(model, "cut", 0)
    s = torch.linalg.svdvals(full)
    torch.testing.assert_close((full - cut).norm(), s[4:].norm(), atol=1e-10, rtol=0)


def test_ties_against_a_slow_transcription():
    model, _ = two()
    ll.combine(model, {"a": 1.0, "b": 2.0}, name="t", method="ties", rank=12, density=0.3)
    deltas = [delta(model, "a", 0), 2 * delta(model, "b", 0)]
    for d in deltas:
        order = d.abs().flatten().sort(descending=True).values
        d[d.abs() < order[round(0.3 * d.numel()) - 1]] = 0
    want = torch.zeros(12, 20, dtype=torch.float64)
    for i in range(12):
        for j in range(20):
            values = [float(d[i, j]) for d in deltas]
            sign = (sum(values) > 0) - (sum(values) < 0)
            same = [v for v in values if v * sign > 0]
            want[i, j] = sum(same) / len(same) if same else 0
    torch.testing.assert_close(delta(model, "t", 0), want, atol=1e-10, rtol=0)


def test_dare_keeps_the_expected_update():
    model, _ = two()
    a = delta(model, "a", 0)
    total = torch.zeros_like(a)
    for seed in range(200):
        ll.combine(model, {"a": 1.0}, name="d", method="dare", rank=12, density=0.5, seed=seed)
        d = delta(model, "d", 0)
        assert (d.abs() < 1e-9).sum() > 60
        total += d
        ll.detach(model, "d")
    assert (total / 200 - a).norm() / a.norm() < 0.12


@pytest.mark.parametrize(
    ("kwargs", "word"), [({"method": "ties"}, "rank"), ({"density": 0.0}, "density"), ({"method": "mean"}, "method")]
)
def test_refusals(kwargs, word):
    model, _ = two()
    with pytest.raises(ll.ConfigError, match=word):
        ll.combine(model, {"a": 1.0}, name="x", **kwargs)
    with pytest.raises(ll.StateError, match="called 'c'"):
        ll.combine(model, {"c": 1.0}, name="x")
    assert list(ll.adapters(model)) == ["a", "b"]


def test_a_method_that_is_not_linear_in_its_weight_is_refused():
    model, _ = two()
    ll.attach(model, ll.AntiPaSTOConfig(r=4), name="turn")
    with pytest.raises(ll.StateError, match="not linear in its weight"):
        ll.combine(model, {"a": 1.0, "turn": 0.5}, name="x")


@pytest.mark.parametrize("kind", ["conv", "embedding"])
def test_a_sum_on_other_kinds_of_layers_loads_again(kind, tmp_path):
    torch.manual_seed(0)
    layer, x = (nn.Conv1d(3, 6, 3), torch.randn(2, 3, 9)) if kind == "conv" else (nn.Embedding(11, 8), torch.arange(11))
    model = nn.Sequential(layer)
    outputs = [model(x)]
    for name, r in (("a", 2), ("b", 3)):
        ll.attach(model, ll.LoRAConfig(r=r, alpha=5, target_kinds=(kind,)), name=name)
        for p in ll.adapters(model)[name].parameters():
            p.data.normal_()
        outputs.append(model(x))
    bare, a, b = outputs
    ll.combine(model, {"a": 0.5, "b": -2.0}, name="c")
    torch.testing.assert_close(model(x), bare + 0.5 * (a - bare) - 2 * (b - bare), atol=1e-4, rtol=1e-4)
    path, want = ll.save(model, tmp_path / "c", name="c"), model(x)
    ll.detach(model)
    ll.load(model, path)
    torch.testing.assert_close(model(x), want)
