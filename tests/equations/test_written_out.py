"""AdaMSS, FRoD, PEFT's GLoRA, Lily, Poly, VeLoRA and aLoRA, written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise

F64 = {"dtype": "float64"}


def exact(got, want):
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_adamss():
    model, fc, _ = adapted(ll.AdaMSSConfig(r=7, subspaces=3, subspace_rank=2, **F64))
    U, _, Vh = torch.linalg.svd(fc.weight.detach(), full_matrices=False)
    exact(fc.lora_Q.mT @ fc.lora_Q, Vh[:7].mT @ Vh[:7])  # each vector up to its sign
    signs = ((Vh[:7] * fc.lora_Q).sum(1)).sign()
    for cluster, A in enumerate(fc.lora_A):
        rows = U[fc.lora_c == cluster, :7] * signs
        exact((A @ A.mT).detach(), torch.eye(2).double())
        exact((rows @ A.mT).detach().norm(dim=0), nn.functional.pad(torch.linalg.svdvals(rows), (0, 1))[:2])
    assert sorted(set(fc.lora_c.tolist())) == [0, 1, 2] and torch.equal(
        dense_change(model), torch.zeros(12, 20).double()
    )
    randomise(model)
    want = torch.stack([fc.lora_B[j] @ fc.lora_A[fc.lora_c[j]] @ fc.lora_Q for j in range(12)])
    exact(dense_change(model), want.detach())


def test_frod_of_two_layers_of_one_name():
    torch.manual_seed(3)
    model = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 9)}) for _ in range(2)).double()
    ll.attach(model, ll.FRoDConfig(sparse_rate=0.2, ridge=1e-3, target_names=("up",), **F64))
    shared = {k.split(":")[0]: v for k, v in model.named_buffers() if ":" in k}
    V, (rows, columns) = shared["lora_V"], shared["lora_at"]
    layers = [block["up"] for block in model]
    Q = torch.linalg.qr(torch.cat([layer.weight for layer in layers])).Q
    parts = [part.mT @ part + 1e-3 * torch.eye(6) for part in Q.split(9)]
    mean = sum(torch.linalg.inv(part) for part in parts) / 2
    R = torch.linalg.qr(torch.cat([layer.weight for layer in layers])).R
    across = torch.linalg.solve(R.mT, V)  # V = Rᵀ E with the eigenvectors E of the mean
    exact(across.mT @ across, torch.eye(6).double())
    apart = across.mT @ mean @ across
    exact(apart - torch.diag(apart.diag()), torch.zeros(6, 6).double())
    assert len(rows) == int(0.2 * 36) and (rows != columns).all()
    x = torch.randn(4, 6, dtype=torch.float64)
    for layer in layers:
        exact(layer.lora_U.norm(dim=0), torch.ones(6).double())
        scales = layer.weight @ torch.linalg.inv(V).mT / layer.lora_U  # W = U diag(l) Vᵀ
        exact(scales, scales[:1].expand(9, 6))
    randomise(model)
    for layer in layers:
        S = torch.zeros(6, 6).double().index_put((rows, columns), layer.lora_s)
        W = layer.weight + layer.lora_U @ (torch.diag(layer.lora_l) + S) @ V.mT
        exact(layer(x), x @ W.mT + layer.bias)


def glora_part(fc, k, form, shape):
    """The matrix or vector that a form stands for."""
    if form == "low_rank":
        return (getattr(fc, f"lora_{k}d") @ getattr(fc, f"lora_{k}u")).view(shape)
    if form == "none":
        return torch.zeros(shape).double()
    t = getattr(fc, f"lora_{k}")
    return t[:, None].expand(shape) if len(shape) == 2 else t.expand(shape)


@pytest.mark.parametrize("matrices", ["low_rank", "vector", "constant", "none"])
@pytest.mark.parametrize(("prompt", "biases"), [("low_rank", "constant"), ("vector", "vector"), ("none", "vector")])
def test_glora(matrices, prompt, biases):
    model, fc, x = adapted(ll.GLoRAConfig(r=4, matrices=matrices, prompt=prompt, biases=biases, **F64))
    randomise(model)
    A, B = (glora_part(fc, k, matrices, (12, 20)) for k in "AB")
    C = glora_part(fc, "C", prompt, (20,))
    D, E = (glora_part(fc, k, biases, (12,)) for k in "DE")
    W, b = fc.weight, fc.bias
    exact(model(x), x @ (W + W * A + B).mT + b + b * D + E + W @ C)


def test_lily_gives_each_token_its_mixture():
    torch.manual_seed(2)
    model = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 9)}) for _ in range(4)).double()
    ll.attach(model, ll.LilyConfig(r=3, alpha=7, stride=2, experts=3, target_names=("up",), **F64))
    randomise(model)
    state, x = ll.adapter_state_dict(model), torch.randn(2, 5, 6, dtype=torch.float64)
    B = state["0.up.lora_B"]
    assert sorted(k for k in state if not k.endswith("_R")) == ["0.up.lora_A", "0.up.lora_B", "2.up.lora_A"]
    for i, block in enumerate(model):
        A, R, layer = state[f"{i // 2 * 2}.up.lora_A"], state[f"{i}.up.lora_R"], block["up"]
        with torch.no_grad(), ll.active(model, None):
            want = layer(x)
        for row in range(2):
            for t in range(5):
                z = A @ x[row, t]
                p = torch.softmax(R @ z, 0)
                want[row, t] += 7 / 3 * sum(p[e] * B[e] @ z for e in range(3))
        exact(layer(x).detach(), want)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("splits", [1, 2])
def test_poly(tasks, splits):
    model, fc, x = adapted(ll.PolyConfig(r=3, alpha=7, tasks=tasks, splits=splits, skills=4, **F64))
    randomise(model)
    model.eval()
    ids = [2, 0, 1, 1, 2] if tasks > 1 else [0] * 5
    with torch.no_grad(), ll.active(model, None):
        bare = model(x)
    with ll.context(model, task_ids=ids):
        got, three = model(x), model(x[:, None].expand(-1, 4, -1))
    for i, t in enumerate(ids):
        w = torch.sigmoid(fc.lora_l[t])
        w = w / w.sum(-1, keepdim=True)
        A = torch.cat([sum(w[q, k] * fc.lora_A[q, k] for k in range(4)) for q in range(splits)], 1)
        B = torch.cat([sum(w[q, k] * fc.lora_B[q, k] for k in range(4)) for q in range(splits)], 0)
        want = bare[i] + 7 / 3 * B @ A @ x[i]
        exact(got[i], want)
        exact(three[i], want.expand(4, -1))


@pytest.mark.parametrize("groups", [4, 3])
def test_velora_learns_A_from_a_sketch(groups):
    """Three groups of 20 features: the last one is filled up with a zero."""
    model, fc, x = adapted(ll.VeLoRAConfig(r=3, alpha=7, groups=groups, gradient_scale=0.7, **F64))
    randomise(model)
    x.requires_grad_()
    for training in (False, True):
        model.train(training)
        exact(model(x), x @ (fc.weight + 7 / 3 * fc.lora_B @ fc.lora_A).mT + fc.bias)
    weights = torch.randn(5, 12, dtype=torch.float64)
    found = torch.autograd.grad((model(x) * weights).sum(), [x, fc.lora_A, fc.lora_B])
    X = nn.functional.pad(x.detach(), (0, -20 % groups)).view(5, groups, -1)
    v = X.mean((0, 1)) / X.mean((0, 1)).norm()
    sketch = ((X @ v)[..., None] * v).flatten(1)[:, :20]
    exact(found[0], weights @ (fc.weight + 7 / 3 * fc.lora_B @ fc.lora_A))
    exact(found[1], 0.7 * 7 / 3 * (weights @ fc.lora_B).mT @ sketch)
    exact(found[2], 7 / 3 * weights.mT @ (x @ fc.lora_A.mT))


@pytest.mark.parametrize("rooted", [False, True])
def test_alora_of_every_token_is_lora(rooted):
    model, fc, x = adapted(ll.ALoRAConfig(r=3, alpha=7, use_rslora=rooted, **F64))
    randomise(model)
    s = 7 / 3**0.5 if rooted else 7 / 3
    exact(dense_change(model), (s * fc.lora_B @ fc.lora_A).detach())
