"""Methods whose layers share tensors, against their sums written out, entry by entry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lora_lite as ll
from equations.helpers import randomise
from lora_lite.runtime.view.expert import layer_views


def built(cfg, sizes=((20, 12), (12, 20), (20, 12))):
    """(model of layers on one input each, views): a fresh adapter returns the base."""
    torch.manual_seed(11)
    model = nn.ModuleList([nn.Linear(d_in, d_out) for d_in, d_out in sizes]).double()
    ll.attach(model, cfg)
    return model, layer_views(model, ll.adapters(model)["default"].record)


def dense(layer):
    """W' − W, read off the layer."""
    one = torch.eye(layer.in_features).double()
    with torch.no_grad():
        return (layer(one) - layer(0 * one[:1])).mT - layer.weight


def compare(model, views, want):
    for layer, view in zip(model, views, strict=True):
        torch.testing.assert_close(dense(layer), want(view).detach(), atol=1e-10, rtol=0)
        assert want(view).norm() > 1e-5
        if view._slot.factors is not None:
            A, B = view._slot.factors(view)
            torch.testing.assert_close(B @ A, want(view), atol=1e-10, rtol=0)


def fresh_is_the_base(model, bound=0.0):
    for layer in model:
        x = torch.randn(4, layer.in_features).double()
        y = nn.functional.linear(x, layer.weight, layer.bias)
        assert (layer(x) - y).abs().max() <= bound * y.abs().max()


def test_vera():
    model, views = built(ll.VeRAConfig(r=5, rank_pattern={"1": 3}, dtype="float64"))
    fresh_is_the_base(model)
    assert views[0].lora_A is views[1].lora_A and views[0].lora_A.shape == (5, 20)
    assert views[0].lora_A.abs().max() <= math.sqrt(6 / 20) and views[0].lora_B.shape == (20, 5)
    assert all(((view.lora_d - 0.1).abs() < 1e-7).all() and len(view.lora_d) == view.cfg.r for view in views)
    randomise(model)

    def want(view):
        total = torch.zeros(view.out_features, view.in_features).double()
        for i in range(view.out_features):
            for j in range(view.in_features):
                for k in range(view.cfg.r):
                    total[i, j] += view.lora_b[i] * view.lora_B[i, k] * view.lora_d[k] * view.lora_A[k, j]
        return total

    compare(model, views, want)


def test_pvera():
    model, views = built(ll.PVeRAConfig(r=5, dtype="float64"))
    fresh_is_the_base(model)
    randomise(model)
    model.eval()

    def want(view):
        A, d = view.lora_A[0][:, : view.in_features], view.lora_d[0]
        return view.lora_b[:, None] * view.lora_B[: view.out_features] @ (d[:, None] * A)

    compare(model, views, want)
    layer, view, x = model[0].train(), views[0], torch.randn(1, 20).double()
    torch.manual_seed(3)
    got = layer(x)[0]
    torch.manual_seed(3)
    noise = torch.randn(1, 5, dtype=torch.float64)[0]
    h = view.lora_d.flatten() * (view.lora_A.reshape(10, -1)[:, :20] @ x[0])
    z = h[:5] + noise * torch.exp(h[5:]) ** 0.5
    y = nn.functional.linear(x, layer.weight, layer.bias)[0] + view.lora_b * (view.lora_B[:12] @ z)
    torch.testing.assert_close(got, y, atol=1e-10, rtol=0)


@pytest.mark.parametrize("pairing", ["paper", "peft"])
def test_randlora(pairing):
    model, views = built(ll.RandLoRAConfig(r=5, alpha=7, pairing=pairing, dtype="float64"))
    fresh_is_the_base(model)
    assert views[0].lora_A.shape == (5, 12) and views[0].lora_B.shape == (20, 3, 5)
    torch.testing.assert_close(views[0].lora_gamma, torch.full((3, 12), 1 / 12).double())
    assert ll.RandLoRAConfig().scale == 20 and views[0].cfg.scale == 7 / 5
    randomise(model)

    def want(view):
        A, B, at, gamma = view.lora_A, view.lora_B, view.lora_lambda, view.lora_gamma
        total = torch.zeros(20, 12).double()
        for n in range(3):
            for k in range(5):
                row, pair = (k, n) if pairing == "paper" else divmod(n * 5 + k, 3)
                total = total + torch.outer(B[:, n, k], at[row, pair] * A[row] * gamma[pair])
        return 7 / 5 * (total if view.out_features == 20 else total.mT)

    compare(model, views, want)


def test_vblora():
    model, views = built(ll.VBLoRAConfig(r=3, vectors=6, topk=2, dtype="float64"))
    assert views[0].lora_bank.shape == (6, 4) and views[0].lora_bank is views[2].lora_bank
    assert views[0].lora_logits_A.shape == (3, 5, 6) and views[0].lora_logits_B.shape == (3, 3, 6)
    randomise(model)

    def piece(view, logits):
        first, second = logits.argsort(descending=True)[:2].tolist()
        a, b = logits[first].exp(), logits[second].exp()
        return (a * view.lora_bank[first] + b * view.lora_bank[second]) / (a + b)

    def want(view):
        r, tiles_A, tiles_B = 3, view.in_features // 4, view.out_features // 4
        A = [torch.cat([piece(view, view.lora_logits_A[k, i]) for i in range(tiles_A)]) for k in range(r)]
        B = [torch.cat([piece(view, view.lora_logits_B[i, k]) for i in range(tiles_B)]) for k in range(r)]
        return torch.stack([torch.outer(b, a) for a, b in zip(A, B, strict=True)]).sum(0)

    compare(model, views, want)


def test_vblora_of_two_lengths_has_two_banks():
    model, views = built(ll.VBLoRAConfig(r=2, vectors=5), ((20, 12), (9, 6), (8, 12)))
    assert [view.lora_bank.shape[1] for view in views] == [4, 3, 4]
    assert views[0].lora_bank is views[2].lora_bank and views[1].lora_bank is not views[0].lora_bank
    with pytest.raises(ll.ConfigError, match="length=5 does not divide a 20->12 layer; 4 does"):
        built(ll.VBLoRAConfig(length=5))
    with pytest.raises(ll.ConfigError, match="topk"):
        ll.VBLoRAConfig(vectors=1)


def test_unilora():
    model, views = built(ll.UniLoRAConfig(r=3, length=7, dtype="float64"))
    places = [at for view in views for at in (view.lora_at_A, view.lora_at_B)]
    counts = [sum(int((at == i).sum()) for at in places) for i in range(7)]
    assert sum(counts) == 3 * 3 * 32 and min(counts) > 0
    torch.testing.assert_close(views[1].lora_unit, torch.tensor(counts).double() ** -0.5, atol=1e-7, rtol=0)
    assert ll.adapters(model)["default"].num_parameters() == 7
    randomise(model)

    def want(view):
        def entry(i):
            return view.lora_theta[i] / math.sqrt(counts[i])

        A = torch.stack([torch.stack([entry(i) for i in row]) for row in view.lora_at_A.tolist()])
        B = torch.stack([torch.stack([entry(i) for i in row]) for row in view.lora_at_B.tolist()])
        return B @ A

    compare(model, views, want)


def test_unilora_is_an_isometry():
    """‖all A and B‖ = ‖θ‖."""
    model, views = built(ll.UniLoRAConfig(r=3, length=7, dtype="float64"))
    randomise(model)
    size = sum(t.square().sum() for view in views for t in view._slot.factors(view))
    torch.testing.assert_close(size, views[0].lora_theta.square().sum(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("tying", "alike"), [(0.0, 0), (0.5, 1), (1.0, 2)])
def test_tinylora(tying, alike):
    model, views = built(ll.TinyLoRAConfig(r=3, u=4, alpha=7, tying=tying, dtype="float64"))
    fresh_is_the_base(model)
    assert sum(view.lora_v is views[0].lora_v for view in views[1:]) == alike or tying == 0.5
    for layer, view in zip(model, views, strict=True):
        U, S, Vh = torch.linalg.svd(layer.weight)
        torch.testing.assert_close(view.lora_B @ view.lora_A, U[:, :3] * S[:3] @ Vh[:3], atol=1e-10, rtol=0)
        torch.testing.assert_close(view.lora_A.norm(dim=1), S[:3].sqrt(), atol=1e-10, rtol=0)
    randomise(model)
    compare(
        model,
        views,
        lambda v: 7 / 3 * v.lora_B @ sum(v.lora_v[i] * v.lora_P[i] for i in range(4)) @ v.lora_A,
    )


def test_rasa():
    """Layers 0 and 2 are one sort of a block; layer 1 has another size and a pool of its own."""
    model, views = built(ll.RaSAConfig(r=4, pooled=1, alpha=6, dtype="float64"))
    fresh_is_the_base(model)
    assert [view.lora_pool_A.shape for view in views] == [(2, 20), (1, 12), (2, 20)]
    assert views[0].lora_pool_B is views[2].lora_pool_B and views[0].lora_mix is not views[2].lora_mix
    assert views[0].lora_mix.shape == (5,) and not views[0].lora_mix.any()
    randomise(model)

    def want(view):
        total, pool = 0, view.lora_pool_A.shape[0]
        for i in range(3):
            m = 0.5 * 6 / 3 * (1 + view.lora_mix[i])  # theirs: constant_(mixing[:r-k], 0.5 alpha / (r-k))
            total = total + m * torch.outer(view.lora_B[:, i], view.lora_A[i])
        for i in range(pool):
            m = 0.5 * 6 / pool * (1 + view.lora_mix[3 + i])
            total = total + m * torch.outer(view.lora_pool_B[:, i], view.lora_pool_A[i])
        return total

    compare(model, views, want)
    for bad in (0, 4):
        with pytest.raises(ll.ConfigError, match="leave a rank"):
            built(ll.RaSAConfig(r=4, pooled=bad))
