"""Methods made of other adapters, written out: GenKnowSub, X-LoRA, MoLE, AdapterFusion."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from equations.helpers import Box, adapted, randomise

F64 = {"dtype": "float64"}


def boxed(names="abc", config=ll.LoRAConfig, **fields):
    """A `Box` with one random adapter for each name, an input, and what each adapter adds to the output."""
    torch.manual_seed(11)
    model, x = Box(20, 12, True, torch.float64), torch.randn(5, 3, 20, dtype=torch.float64)
    for i, name in enumerate(names):
        ll.attach(model, config(r=2 + i, alpha=5, **fields, **F64), name=name)
    randomise(model)
    changes = []
    with torch.no_grad():
        with ll.active(model, None):
            bare = model(x)
        for name in names:
            with ll.active(model, name):
                changes.append(model(x) - bare)
    return model, x, bare, torch.stack(changes, -2)  # (..., E, d_out)


def attached(model, cfg, experts):
    ll.attach(model, cfg, experts, name="mix")
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in ll.adapters(model)["mix"].parameters():
            p += 0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return {n.rpartition(".")[2].removesuffix("@mix"): p for n, p in model.named_parameters() if n.endswith("@mix")}


def factors(model, names="abc"):
    return [ll.factors(model, name) for name in names]


def test_genknowsub():
    model, x, bare, h = boxed("abcd")
    ll.attach(model, ll.ArrowConfig(top=1, temperature=0.5, general=2, **F64), factors(model, "abcd"), name="mix")
    general = h[..., 2:, :].mean(-2)
    keys = []
    D = [B @ A for A, B in (one["fc"] for one in factors(model, "abcd"))]
    for e in range(2):
        keys.append(torch.linalg.svd(D[e] - (D[2] + D[3]) / 2).Vh[0])
    best = (x @ torch.stack(keys).mT).abs().argmax(-1)
    want = bare + torch.stack([h[..., e, :] - general for e in range(2)], -2).gather(
        -2, best[..., None, None].expand(5, 3, 1, 12)
    ).squeeze(-2)
    torch.testing.assert_close(model(x), want, atol=1e-10, rtol=0)
    with pytest.raises(ll.ConfigError, match="leaves none"):
        ll.attach(model, ll.ArrowConfig(general=2, **F64), factors(model, "ab"), name="none")


@pytest.mark.parametrize("top", [0, 2])
@pytest.mark.parametrize("per", ["token", "row"])
def test_xlora(top, per):
    model, x, bare, h = boxed()
    fresh = ll.attach(model, ll.XLoRAConfig(width=7, top=top, temperature=0.6, **F64), factors(model), name="mix")
    hidden = torch.randn(5, 3, 7, dtype=torch.float64)
    with ll.context(model, hidden=hidden):
        torch.testing.assert_close(model(x), bare + h.mean(-2) if not top else model(x), atol=1e-10, rtol=0)
    assert fresh.trainable
    ll.detach(model, "mix")
    t = attached(model, ll.XLoRAConfig(width=7, top=top, temperature=0.6, **F64), factors(model))
    hidden = hidden if per == "token" else hidden[:, 0]
    p = ((hidden @ t["lora_G"].mT + t["lora_g"]) / 0.6).softmax(-1)
    p = p if per == "token" else p[:, None].expand(5, 3, 3)
    for i, j in ((i, j) for i in range(5) for j in range(3) if top):
        p = p.clone()
        p[i, j, p[i, j].argmin()] = 0
    with ll.context(model, hidden=hidden):
        torch.testing.assert_close(model(x), bare + (p[..., None] * h).sum(-2), atol=1e-10, rtol=0)
        rows = ["mix", None, "a", "mix", "b"]
        with ll.rows(model, rows):
            cut = model(x)
        torch.testing.assert_close(cut[3], model(x)[3])
    assert torch.equal(cut[1], bare[1])
    with pytest.raises(ll.SelectionError, match="hidden"):
        model(x)
    with ll.context(model, hidden=torch.zeros(5, 4, 7)), pytest.raises(ll.ConfigError, match=r"\(5, 4, 7\)"):
        model(x)


def test_mole():
    model, x, bare, h = boxed()
    t = attached(model, ll.MoLEConfig(temperature=0.6, **F64), factors(model))
    side_by_side = h.flatten(-2)
    normal = side_by_side / side_by_side.square().mean(-1, keepdim=True).sqrt()
    p = (normal @ t["lora_G"].flatten(1).mT / (3 * 12) / 0.6).softmax(-1)
    assert (p - 1 / 3).abs().max() > 1e-2
    torch.testing.assert_close(model(x), bare + (p[..., None] * h).sum(-2), atol=1e-10, rtol=0)


def test_mole_is_kept_in_balance():
    model, x, _, h = boxed()
    t = attached(model, ll.MoLEConfig(balance=0.3, **F64), factors(model))
    side_by_side = h.flatten(-2)
    normal = side_by_side / side_by_side.square().mean(-1, keepdim=True).sqrt()
    p = (normal @ t["lora_G"].flatten(1).mT / (3 * 12)).softmax(-1)
    model.train()(x)
    mean = p.flatten(0, -2).mean(0)
    torch.testing.assert_close(ll.penalty(model, "mix"), -0.3 * sum(mean[e].log() for e in range(3)))


@pytest.mark.parametrize("kind", ["low_rank", "bottleneck"])
def test_adapter_fusion(kind):
    if kind == "low_rank":
        model, x, bare, h = boxed()
        experts, fields = factors(model), {}
    else:
        fields = {"activation": "gelu"}
        torch.manual_seed(11)
        model, x = Box(20, 12, True, torch.float64), torch.randn(5, 3, 20, dtype=torch.float64)
        changes = []
        with torch.no_grad():
            bare = model(x)
        for i, name in enumerate("abc"):
            cfg = ll.BottleneckConfig(r=2 + i, learned_scale=i == 1, target_roles=None, **fields, **F64)
            ll.attach(model, cfg, name=name)
        randomise(model)
        for name in "abc":
            with torch.no_grad(), ll.active(model, name):
                changes.append(model(x) - bare)
        h = torch.stack(changes, -2)
        experts = [ll.adapter_state_dict(model, name) for name in "abc"]
    t = attached(model, ll.AdapterFusionConfig(temperature=2.0, **fields, **F64), experts)
    query = bare @ t["lora_Q"].mT + t["lora_q"]
    p = ((query[..., None, :] * (h @ t["lora_K"].mT)).sum(-1) / 2.0).softmax(-1)
    assert (p - 1 / 3).abs().max() > 1e-2
    value = h @ (torch.eye(12).double() + t["lora_V"]).mT
    torch.testing.assert_close(model(x), bare + (p[..., None] * value).sum(-2), atol=1e-10, rtol=0)
    torch.testing.assert_close(ll.penalty(model, "mix"), 0.01 * t["lora_V"].square().sum())


def test_what_they_say_when_they_are_given_something_else():
    model = Box(20, 12, True, torch.float32)
    for cfg in (ll.XLoRAConfig(), ll.MoLEConfig(), ll.AdapterFusionConfig()):
        with pytest.raises(ll.ConfigError, match=rf"{type(cfg).__name__}\(\), \[ll.factors\(model, name\)"):
            ll.attach(model, cfg, [torch.zeros(3, 20)])
    assert isinstance(model.fc, nn.Linear) and not list(model.fc.buffers())


def test_a_mixture_is_saved_whole(tmp_path):
    model, x, _, _ = boxed()
    attached(model, ll.MoLEConfig(**F64), factors(model))
    want = model(x)
    ll.save(model, tmp_path / "mix", name="mix")
    other, _, _ = adapted(ll.LoRAConfig(**F64))
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k}, strict=False)
    ll.detach(other)
    ll.load(other, tmp_path / "mix.safetensors")
    torch.testing.assert_close(other(x), want, atol=0, rtol=0)
