"""CorDA, ASVD and half-covariance whitening, in fp64 against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.core.errors import ConfigError

R, ALPHA, S = 3, 7.0, 7 / 3


def fresh(dtype=torch.float64):
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(20, 12)).to(dtype).eval()
    X = torch.randn(50, 20, dtype=dtype) @ torch.randn(20, 20, dtype=dtype) * torch.linspace(0.1, 2, 20, dtype=dtype)
    return model, X


def whitening(X, whiten):
    """P, the slow way."""
    C = sum(torch.outer(x, x) for x in X) / len(X)
    C = C + 0.01 * C.diagonal().mean() * torch.eye(20).double()
    if whiten == "asvd":
        return torch.diag(torch.stack([sum(abs(x[j]) for x in X) / len(X) for j in range(20)]) ** 0.5)
    U, e, _ = torch.linalg.svd(C)
    return {"none": torch.eye(20).double(), "cov": C, "cov_half": U @ torch.diag(e.sqrt()) @ U.mT}[whiten]


def attach(model, X, whiten, mode="ipm", r=R, alpha=ALPHA):
    cfg = ll.CorDAConfig(r=r, alpha=alpha, whiten=whiten, mode=mode, dtype="float64")
    ll.attach(model, cfg, [X[:20], X[20:]])
    return model[0]


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("whiten", ["none", "asvd", "cov", "cov_half"])
def test_start_and_forward(whiten, mode):
    model, X = fresh()
    y, W, b = model(X), model[0].weight.detach(), model[0].bias.detach()
    layer = attach(model, X, whiten, mode)
    assert torch.equal(model(X), y)
    P = whitening(X, whiten)
    U, e, Vh = torch.linalg.svd(W @ P)
    ks = range(R) if mode == "ipm" else range(12 - R, 12)
    want = sum(e[k] * torch.outer(U[:, k], Vh[k]) for k in ks) @ torch.linalg.inv(P)
    torch.testing.assert_close(S * layer.lora_B0 @ layer.lora_A0, want, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(layer.lora_A0.norm(), layer.lora_B0.norm())
    for p in (layer.lora_A, layer.lora_B):
        nn.init.normal_(p)
    A, B = layer.lora_A0 + layer.lora_A, layer.lora_B0 + layer.lora_B
    slow = torch.stack([(W - want + S * B @ A) @ x + b for x in X])
    torch.testing.assert_close(model(X), slow, atol=1e-10, rtol=1e-9)


def test_half_covariance_keeps_most_of_the_output():
    error = {}
    for whiten in ("none", "asvd", "cov", "cov_half"):
        model, X = fresh()
        layer = attach(model, X, whiten)
        rest = layer.weight.detach() - S * layer.lora_B0 @ layer.lora_A0
        error[whiten] = float((rest @ whitening(X, "cov_half")).norm())
    W = fresh()[0][0].weight.detach()
    tail = torch.linalg.svdvals(W @ whitening(X, "cov_half"))[R:].norm()
    assert error["cov_half"] == pytest.approx(float(tail), rel=1e-9)
    assert all(error["cov_half"] < e * 0.99 for w, e in error.items() if w != "cov_half")


@pytest.mark.parametrize("whiten", ["none", "asvd", "cov", "cov_half"])
@pytest.mark.parametrize("alpha", [7.0, -5.0])
def test_all_components_are_the_weight(whiten, alpha):
    model, X = fresh()
    layer = attach(model, X, whiten, r=12, alpha=alpha)
    torch.testing.assert_close(alpha / 12 * layer.lora_B0 @ layer.lora_A0, layer.weight, atol=1e-9, rtol=1e-9)


def test_file_needs_no_data_and_bf16_identity(tmp_path):
    model, X = fresh(torch.bfloat16)
    y = model(X)
    ll.attach(model, ll.CorDAConfig(r=R, alpha=ALPHA), [X])
    assert torch.equal(model(X), y)
    model, X = fresh(torch.float32)
    layer = ll.attach(model, ll.CorDAConfig(r=R, alpha=ALPHA), [X]) and model[0]
    nn.init.normal_(layer.lora_A)
    y = model(X)
    ll.save(model, tmp_path / "x")
    ll.detach(model)
    ll.load(model, tmp_path / "x.safetensors")
    assert torch.equal(model(X), y)


def test_refusals():
    model, X = fresh()
    with pytest.raises(ConfigError, match="rank 13"):
        ll.attach(model, ll.CorDAConfig(r=13), [X])
    with pytest.raises(ConfigError, match="damping"):
        ll.CorDAConfig(damping=0.0)
