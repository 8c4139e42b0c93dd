"""OSF, AdaMSS, FRoD, GLoRA, Lily and Poly against PEFT: the same tensors, outputs and gradients."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import peft
import pytest
import torch
from peft.tuners.adamss import layer as adamss_layer

import lora_lite as ll
from equations.helpers import Box, randomise
from parity.against_peft import Two, compare, pair, relative


def test_osf():
    """PEFT's outputs agree where our change is made of directions that its gradients can take."""
    mine, theirs = pair(ll.OSFConfig(r=5, dtype="float64"), peft.OSFConfig(effective_rank=19))
    for path in ("up", "down"):
        layer, other = mine.get_submodule(path), theirs.get_submodule(path)
        torch.testing.assert_close(layer.lora_S0, other._osf_S_low_init["default"], atol=1e-5, rtol=1e-4)

    def link(layer):
        W = layer.weight.detach()
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        r = len(layer.lora_S)
        U_h, V_h = U[:, :-r], Vh[:-r]
        found = {
            "U_low": layer.lora_U0 + layer.lora_U - U_h @ (U_h.mT @ layer.lora_U),
            "S_low": layer.lora_S0 + layer.lora_S,
            "V_low": layer.lora_V0 + layer.lora_V - (layer.lora_V @ V_h.mT) @ V_h,
        }
        # PEFT decomposes in fp32, so its copy of the start is put in the place of ours
        return {f"osf_svd_params.default.{k}": v for k, v in found.items()}

    for path in ("up", "down"):
        layer, other = mine.get_submodule(path), theirs.get_submodule(path)
        other._osf_U_low_init["default"], other._osf_S_low_init["default"] = layer.lora_U0, layer.lora_S0
        other._osf_V_low_init["default"] = layer.lora_V0
        for handle in other.hook_handles:
            handle.remove()  # the filter of its gradients is our parametrisation
    compare(mine, theirs, link)


def test_the_change_of_osf_keeps_off_the_large_triplets():
    """After steps of AdamW too, where filtered gradients do not: U_hᵀ ΔW = 0 and ΔW V_h = 0."""
    torch.manual_seed(0)
    model = Two(8, 12, torch.float64)
    ll.attach(model, ll.OSFConfig(r=3, dtype="float64"))
    optimizer = torch.optim.AdamW(ll.adapters(model)["default"].parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 8, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    for layer in (model.up, model.down):
        W = layer.weight.detach()
        eye, zero = torch.eye(W.shape[1]).double(), torch.zeros(1, W.shape[1]).double()
        change = (layer(eye) - layer(zero)).mT.detach() - W
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        assert change.abs().max() > 1e-3
        assert (U[:, :5].mT @ change @ Vh[:5].mT).abs().max() < 1e-10


def test_adamss(monkeypatch):
    """PEFT's clusters come from sklearn; ours are put in their place. It moves the bias too."""
    mine = Two(24, 36, torch.float64)
    ll.attach(mine, ll.AdaMSSConfig(r=7, subspaces=3, subspace_rank=2, dtype="float64"))
    randomise(mine)
    order = [mine.up.lora_c, mine.down.lora_c]
    monkeypatch.setitem(sys.modules, "sklearn", ModuleType("sklearn"))
    monkeypatch.setattr(adamss_layer, "clustering_Z", lambda *_: (order.pop(0), 3))
    config = peft.AdamssConfig(r=7, num_subspaces=3, subspace_rank=2, target_modules=["up", "down"])
    theirs = peft.get_peft_model(Two(24, 36, torch.float64), config).double().base_model.model

    def link(layer):
        found = {}
        for i in range(3):
            found[f"adamss_A.default.{i}"] = layer.lora_A[i]
            found[f"adamss_B.default.{i}"] = layer.lora_B[layer.lora_c == i]
        return found

    for path in ("up", "down"):
        other, Q = theirs.get_submodule(path).adamss_newB["default"], mine.get_submodule(path).lora_Q
        other.copy_(torch.cat((Q, torch.zeros(7, 1).double()), 1))
    compare(mine, theirs, link)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_frod():
    """Each of the two layers has a name of its own, so V is made of its weight alone."""
    mine, theirs = pair(ll.FRoDConfig(sparse_rate=0.1, dtype="float64"), peft.FrodConfig(sparse_rate=0.1))
    for path in ("up", "down"):
        layer, other = mine.get_submodule(path), theirs.get_submodule(path)
        V = next(v for k, v in mine.named_buffers() if k.startswith("lora_V") and path in k)
        at = next(v for k, v in mine.named_buffers() if k.startswith("lora_at") and path in k)
        other.frod_V["default"], other.frod_s_indices["default"] = V, at
        l0 = (layer.weight @ torch.linalg.inv(V).mT).norm(dim=0)
        layer.l0 = l0.detach()
        other.frod_U["default"] = layer.lora_U

    def link(layer):
        return {"frod_lambda_l.default": layer.l0 + layer.lora_l, "frod_lambda_s_values.default": layer.lora_s}

    compare(mine, theirs, link, tolerance=1e-7)


FORMS = [("low_rank", "low_rank", "constant"), ("vector", "vector", "vector"), ("constant", "none", "none")]


@pytest.mark.parametrize(("matrices", "prompt", "biases"), FORMS)
def test_glora(matrices, prompt, biases):
    mine, theirs = pair(
        ll.GLoRAConfig(r=4, matrices=matrices, prompt=prompt, biases=biases, dtype="float64"),
        peft.GloraConfig(
            r=4,
            config_A_B=matrices.replace("low_rank", "lora"),
            config_C=prompt.replace("low_rank", "lora"),
            config_D_E=biases,
        ),
    )

    def link(layer):
        found = {}
        for k, form in zip("ABCDE", (matrices, matrices, prompt, biases, biases), strict=True):
            if form == "low_rank":
                found |= {f"glora_{k}.default.Xd": getattr(layer, f"lora_{k}d")}
                found |= {f"glora_{k}.default.Xu": getattr(layer, f"lora_{k}u")}
            elif form != "none":
                t = getattr(layer, f"lora_{k}")
                found[f"glora_{k}.default.X"] = t[:, None] if k in "ABC" and form == "vector" else t
        return found

    compare(mine, theirs, link)


def test_lily_of_one_token():
    """Of several, PEFT mixes with the mean of their routers."""
    mine, theirs = pair(
        ll.LilyConfig(r=4, alpha=6, experts=3, dtype="float64"), peft.LilyConfig(r=4, scaling=1.5, num_B=3)
    )
    shared = dict(mine.named_parameters())
    x = torch.randn(1, 24, dtype=torch.float64, requires_grad=True)
    for path in ("up", "down"):
        other = theirs.get_submodule(path)
        B = next(v for k, v in shared.items() if k.startswith("lora_B") and path in k)
        A = next(v for k, v in shared.items() if k.startswith("lora_A") and path in k)
        other.lily_A["default"].weight.data.copy_(A)
        other.lily_router["default"].weight.data.copy_(mine.get_submodule(path).lora_R)
        other.lily_B["default"].weight.data.copy_(B.mT.reshape(3 * 4, -1))
    y, z = mine(x), theirs(x)
    w = torch.randn_like(y)
    at = [torch.autograd.grad((out * w).sum(), x)[0] for out in (y, z)]
    assert relative(y, z) < 1e-9 and relative(*at) < 1e-9
    with ll.active(mine, None):
        assert relative(mine(x), y) > 1e-2


@pytest.mark.parametrize("splits", [1, 2])
def test_poly(splits):
    mine, theirs = pair(
        ll.PolyConfig(r=4, tasks=3, skills=2, splits=splits, dtype="float64"),
        peft.PolyConfig(r=4, n_tasks=3, n_skills=2, n_splits=splits),
    )
    mine.eval()
    theirs.eval()
    tasks = torch.tensor([2, 0])

    def link(layer):
        return {
            "poly_lora_A.default": layer.lora_A.mT,
            "poly_lora_B.default": layer.lora_B.mT,
            "poly_router.default.module_logits": layer.lora_l.flatten(1),
        }

    for path in ("up", "down"):
        layer = theirs.get_submodule(path)
        layer.forward = lambda x, own=layer.forward: own(x, task_ids=tasks)
    with ll.context(mine, task_ids=tasks):
        compare(mine, theirs, link)
    with pytest.raises(ll.SelectionError, match="task_ids"):
        mine(torch.randn(2, 5, 24, dtype=torch.float64))


def test_arrow():
    """PEFT finds the keys by power iteration and normalises among all experts, of which the best are left."""
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer

    model = Two(24, 36, torch.float64)
    names = ["a", "b", "c"]
    for i, name in enumerate(names):
        ll.attach(model, ll.LoRAConfig(r=4, alpha=6, dtype="float64", target_names=("up",)), name=name)
        randomise(model, seed=i)
    experts = [ll.factors(model, name) for name in names]
    cfg = ll.ArrowConfig(top=2, temperature=0.5, dtype="float64", target_names=("up",))
    ll.attach(model, cfg, experts, name="arrow")
    up = model.up
    config = SimpleNamespace(
        top_k=2, router_temperature=0.5, rng_seed=0, task_adapter_names=names, gks_adapter_names=[], use_gks=False
    )
    theirs = ArrowLoraLinearLayer(24, config)
    A = {n: SimpleNamespace(weight=e["up"][0].detach()) for n, e in zip(names, experts, strict=True)}
    B = {n: SimpleNamespace(weight=e["up"][1].detach()) for n, e in zip(names, experts, strict=True)}
    keys = getattr(up, "lora_v@arrow")
    for mine, name in zip(keys, names, strict=True):  # its 15 rounds are not enough here
        key = theirs.top_right_singular_vec_from_BA(A[name].weight, B[name].weight, iters=1000)
        assert abs(abs(float(mine @ key.double())) - 1) < 1e-5
    theirs.prototypes = keys
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    with ll.active(model, None):
        bare = up(x)
    want = bare + theirs(x, A, B, lambda v: v, dict.fromkeys(names, 1.0))
    w = torch.randn_like(want)
    got = up(x)
    assert relative(got, want) < 1e-9 and relative(got, bare) > 1e-2
    at = [torch.autograd.grad((out * w).sum(), x, retain_graph=True)[0] for out in (got, want)]
    assert relative(*at) < 1e-9


def test_arrow_says_what_it_is_made_of():
    model = Two(24, 36, torch.float32)
    with pytest.raises(ll.ConfigError, match=r"ll.factors\(model, name\)"):
        ll.attach(model, ll.ArrowConfig(), [torch.zeros(3, 24)])
    with pytest.raises(ll.ConfigError, match="up: an expert brings"):
        ll.attach(model, ll.ArrowConfig(), [{"up": (torch.zeros(2, 3), torch.zeros(36, 2))}])
    ll.attach(model, ll.IA3Config(target_names=("up",)))
    with pytest.raises(ll.StateError, match="no pair of low-rank factors"):
        ll.factors(model)


@pytest.mark.parametrize("groups", [4, 5])
def test_velora(groups):
    """In training; PEFT normalises in fp32."""
    config = peft.tuners.lora.config.VeloraConfig(num_groups=groups, scale=0.7)
    mine, theirs = pair(
        ll.VeLoRAConfig(r=4, alpha=6, groups=groups, gradient_scale=0.7, dtype="float64"),
        peft.LoraConfig(r=4, lora_alpha=6, velora_config=config),
    )

    def link(layer):
        return {"lora_A.default.weight": layer.lora_A, "lora_B.default.weight": layer.lora_B}

    compare(mine, theirs, link, tolerance=1e-5)


def test_xlora():
    """PEFT's gates of each layer, said by a classifier that reads the last hidden state."""
    from peft.tuners.xlora.layer import XLoraLinearLayer

    model = Box(24, 36, True, torch.float64)
    names = ["a", "b", "c"]
    for i, name in enumerate(names):
        ll.attach(model, ll.LoRAConfig(r=4, alpha=6, dtype="float64"), name=name)
        randomise(model, seed=i)
    experts = [ll.factors(model, name) for name in names]
    cfg = ll.XLoRAConfig(width=7, top=2, temperature=0.7, dtype="float64")
    ll.attach(model, cfg, experts, name="mix")
    randomise(model)
    up, hidden = model.fc, torch.randn(2, 5, 7, dtype=torch.float64)
    base = torch.nn.Linear(24, 36, dtype=torch.float64)
    base.load_state_dict({"weight": up.weight, "bias": up.bias})
    base = peft.tuners.lora.Linear(base, "a", peft.LoraConfig(), r=4, lora_alpha=4)
    for name in names[1:]:
        base.update_layer(name, 4, lora_alpha=4, config=peft.LoraConfig())
    for one, name in zip(experts, names, strict=True):
        base.lora_A[name].weight.data, base.lora_B[name].weight.data = (t.detach().clone() for t in one["fc"])
    base.double().set_adapter(names)
    config = SimpleNamespace(top_k_lora=2, enable_softmax_topk=False, global_scaling_weight=1)
    theirs = XLoraLinearLayer(SimpleNamespace(disabled=False), base, base.forward, 0, config)
    head = [getattr(up, f"lora_{k}@mix") for k in "Gg"]
    scalings = ((hidden @ head[0].mT + head[1]) / 0.7).softmax(-1)[:, :, None]
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    want = theirs.forward(x, scalings=scalings)
    with ll.context(model, hidden=hidden):
        got = model(x)
    w = torch.randn_like(want)
    at = [torch.autograd.grad((out * w).sum(), [x, *head], retain_graph=True) for out in (got, want)]
    assert relative(got, want) < 1e-9 and max(relative(a, b) for a, b in zip(*at, strict=True)) < 1e-9


def test_monteclora():
    """Outside of training; there both draw noise, see the equation tests. PEFT's penalty has a term of another sign."""
    sub = peft.tuners.lora.config.MontecloraConfig(num_samples=4)
    mine, theirs = pair(
        ll.MonteCLoRAConfig(r=4, alpha=6, samples=4, dtype="float64"),
        peft.LoraConfig(r=4, lora_alpha=6, monteclora_config=sub),
    )
    mine.eval(), theirs.eval()
    for path in ("up", "down"):
        a, b = mine.get_submodule(path), theirs.get_submodule(path)
        b.lora_A["default"].weight.data, b.lora_B["default"].weight.data = a.lora_A.detach(), a.lora_B.detach()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    assert relative(mine(x), theirs(x)) < 1e-9


def test_miss_bat():
    mine, theirs = pair(ll.MiSSBatConfig(r=4, dtype="float64"), peft.MissConfig(r=4, init_weights="bat"))
    compare(mine, theirs, lambda layer: {"miss_block.default": layer.lora_M})
