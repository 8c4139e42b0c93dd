"""Bottleneck adapters against their formulas, token by token, and the places where they stand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import lora_lite as ll
import tiny_llm
from equations.helpers import adapted, randomise
from lora_lite.testing.case import randomise as randomise_adapter


def base(model, x):
    with ll.active(model, None):
        return model(x)


@pytest.mark.parametrize(("activation", "f"), [("relu", torch.relu), ("gelu", F.gelu), ("tanh", torch.tanh)])
def test_in_series_with_a_learned_scale(activation, f):
    cfg = ll.BottleneckConfig(
        r=3, alpha=7, activation=activation, learned_scale=True, target_roles=None, dtype="float64"
    )
    model, fc, x = adapted(cfg)
    randomise(model)
    want = []
    for y in base(model, x):
        z = f(fc.lora_D @ y + fc.lora_c)
        want.append(y + 7 / 3 * (fc.lora_U @ z + fc.lora_e) * (1 + fc.lora_g))
    torch.testing.assert_close(model(x), torch.stack(want), atol=1e-10, rtol=0)


def test_compacter_multiplies_with_sums_of_kronecker_products():
    cfg = ll.CompacterConfig(r=6, alpha=7, parts=2, target_roles=None, dtype="float64")
    model, fc, x = adapted(cfg)
    randomise(model)
    R = next(p for n, p in model.named_parameters() if "lora_R" in n)
    D = sum(torch.kron(R[i], torch.outer(fc.lora_u[i], fc.lora_t[i])) for i in range(2))
    U = sum(torch.kron(R[i], torch.outer(fc.lora_w[i], fc.lora_v[i])) for i in range(2))
    assert D.shape == (6, 12) and U.shape == (12, 6)
    want = [y + 7 / 6 * (U @ F.gelu(D @ y + fc.lora_c) + fc.lora_e) for y in base(model, x)]
    torch.testing.assert_close(model(x), torch.stack(want), atol=1e-10, rtol=0)


def test_parallel_to_the_feed_forward_network():
    model = tiny_llm.model().double().eval()
    seen = {}
    mlp = model.model.layers[1].mlp
    x = torch.randint(4, 80, (2, 5))
    ll.attach(model, ll.ParallelAdapterConfig(r=3, alpha=7, dtype="float64"))
    assert ll.adapters(model)["default"].targets == ["model.layers.0.mlp", "model.layers.1.mlp"]
    randomise_adapter(model)
    handle = mlp.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    model(x)
    handle.remove()
    with ll.active(model, None):
        bare = mlp(seen["x"])
    z = torch.relu(seen["x"] @ mlp.lora_D.mT + mlp.lora_c)
    want = bare + 7 / 3 * (z @ mlp.lora_U.mT + mlp.lora_e)
    torch.testing.assert_close(seen["y"], want, atol=1e-10, rtol=0)


def test_a_module_of_another_width_is_named_in_its_first_call():
    model = tiny_llm.model().eval()
    ll.attach(model, ll.ParallelAdapterConfig(r=3, target_names=("rotary_emb|mlp",)))
    model = tiny_llm.model(width=32).eval()
    model.model.layers[0].mlp = torch.nn.Sequential(torch.nn.Linear(32, 20), torch.nn.Linear(20, 32))
    model.model.wide = torch.nn.Sequential(torch.nn.Linear(32, 20), torch.nn.Tanh())
    inner = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda h: inner(h) + 0 * model.model.wide(h).sum()
    ll.attach(model, ll.ParallelAdapterConfig(r=3, target_names=("wide",)))
    with pytest.raises(ll.TargetError, match="model.wide.*returns 20.*target_names"):
        model(torch.randint(4, 80, (1, 4)))


def test_files_and_generation_of_a_module_site(tmp_path):
    model, x = tiny_llm.model().eval(), torch.randint(4, 80, (2, 5))
    ll.attach(model, ll.ParallelAdapterConfig(r=3, alpha=7))
    randomise_adapter(model)
    fresh = tiny_llm.model().eval()
    ll.load(fresh, ll.save(model, tmp_path / "a"))
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached = fresh.generate(x, **how)
    assert torch.equal(cached, model.generate(x, use_cache=False, **how))
    with ll.active(model, None):
        assert not torch.equal(cached, model.generate(x, **how))


@pytest.mark.parametrize("top", [0, 2])
def test_mixture_of_experts(top):
    model, fc, x = adapted(ll.MoLORAConfig(r=3, alpha=7, experts=4, top=top, temperature=0.5, dtype="float64"))
    randomise(model)
    want = []
    for v, y in zip(x, base(model, x), strict=True):
        p = torch.softmax(fc.lora_R @ v / 0.5, 0)
        kept = p.argsort(descending=True)[: top or 4]
        p = p / p[kept].sum()
        want.append(y + 7 / 3 * sum(p[e] * fc.lora_B[e] @ (fc.lora_A[e] @ v) for e in kept))
    torch.testing.assert_close(model(x), torch.stack(want), atol=1e-10, rtol=0)


def test_hydralora():
    model, fc, x = adapted(ll.HydraLoRAConfig(r=3, alpha=7, experts=4, dtype="float64"))
    randomise(model)
    want = []
    for v, y in zip(x, base(model, x), strict=True):
        p = torch.softmax(fc.lora_R @ v, 0)
        want.append(y + 7 / 3 * sum(p[e] * fc.lora_B[e] @ (fc.lora_A @ v) for e in range(4)))
    torch.testing.assert_close(model(x), torch.stack(want), atol=1e-10, rtol=0)


def test_llama_adapter_attends_apart_with_grouped_heads():
    """y + g softmax(q K_Pᵀ/√h) V_P per head, before the output projection, each key head for two query heads."""
    model = tiny_llm.model().double().eval()
    ll.attach(model, ll.AdaptionPromptConfig(r=3, layers=(1,), dtype="float64"))
    randomise_adapter(model)
    attn, seen = model.model.layers[1].self_attn, {}
    attn.q_proj.register_forward_hook(lambda m, a, out: seen.update(q=out))
    attn.o_proj.register_forward_hook(lambda m, a, out: seen.update(new=a[0]))
    x = torch.randint(4, 80, (1, 1))  # one token: its position is 0, so that its query is not rotated
    model(x)
    new = seen["new"][0, 0]
    with ll.active(model, None):
        model(x)
    K, V = attn.lora_P @ attn.k_proj.weight.mT, attn.lora_P @ attn.v_proj.weight.mT
    for head in range(4):
        q, own = seen["q"][0, 0, 8 * head : 8 * head + 8], slice(8 * (head // 2), 8 * (head // 2) + 8)
        p = torch.softmax(K[:, own] @ q / 8**0.5, 0)
        want = seen["new"][0, 0, 8 * head : 8 * head + 8] + attn.lora_g * (p @ V[:, own])
        torch.testing.assert_close(new[8 * head : 8 * head + 8], want, atol=1e-8, rtol=0)
