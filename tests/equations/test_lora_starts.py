"""LoRA-FA, MiLoRA and OLoRA: LoRA from other starts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from equations.helpers import Box, adapted, dense_change, randomise
from lora_lite.core.errors import ConfigError

R, ALPHA = 3, 7.0
S = ALPHA / R


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (13, 7)])
@pytest.mark.parametrize("kind", ["milora", "olora"])
def test_forward_is_lora_on_the_residual_weight(kind, shape):
    config = {"milora": ll.MiLoRAConfig, "olora": ll.OLoRAConfig}[kind]
    model, fc, x = adapted(config(r=R, alpha=ALPHA, dtype="float64"), *shape)
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    W = fc.weight.detach()
    if kind == "milora":
        U, D, Vh = torch.linalg.svd(W, full_matrices=False)
        k = len(D)
        want = sum(D[i] * torch.outer(U[:, i], Vh[i]) for i in range(k - R, k))
        torch.testing.assert_close(S * fc.lora_B0 @ fc.lora_A0, want, atol=1e-10, rtol=0)
        torch.testing.assert_close(fc.lora_B0.norm(), fc.lora_A0.norm())
    else:  # Gram-Schmidt, column by column
        basis = []
        for j in range(R):
            v = W[:, j] - sum((q @ W[:, j]) * q for q in basis)
            basis.append(v / v.norm())
        Q = torch.stack(basis, 1)
        torch.testing.assert_close(fc.lora_B0, Q, atol=1e-10, rtol=0)
        torch.testing.assert_close(fc.lora_A0, Q.mT @ W, atol=1e-10, rtol=0)
    randomise(model)
    change = S * ((fc.lora_B0 + fc.lora_B) @ (fc.lora_A0 + fc.lora_A) - fc.lora_B0 @ fc.lora_A0)
    torch.testing.assert_close(model(x), nn.functional.linear(x, W + change, fc.bias), atol=1e-10, rtol=0)


@pytest.mark.parametrize("init_A", ["orthogonal", "kaiming"])
def test_lora_fa(init_A):
    model, fc, x = adapted(ll.LoRAFAConfig(r=R, alpha=ALPHA, init_A=init_A, use_rslora=True, dtype="float64"))
    y, s = model(x), ALPHA / R**0.5
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["fc.lora_B"]
    gram = fc.lora_A @ fc.lora_A.mT
    if init_A == "orthogonal":
        torch.testing.assert_close(gram, torch.eye(R).double() / 3, atol=1e-6, rtol=0)  # drawn in fp32
    else:
        assert fc.lora_A.abs().max() <= 20**-0.5 and (gram - gram.diag().diag()).abs().max() > 1e-3
    randomise(model)
    torch.testing.assert_close(dense_change(model), s * fc.lora_B.detach() @ fc.lora_A, atol=1e-10, rtol=0)


def test_lora_fa_keeps_no_input_for_backward():
    sizes = {}
    for config in (ll.LoRAFAConfig, ll.LoRAConfig):
        torch.manual_seed(0)
        model = nn.Sequential(Box(64, 48, False, torch.float32), nn.Identity(), Box(48, 8, False, torch.float32))
        ll.attach(model, config(r=2))
        kept = set()
        x = torch.randn(500, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.add(tuple(t.shape)), t)[1], lambda t: t
        ):
            model(x)
        sizes[config] = kept
    inputs = {(500, 64), (64, 500)}
    assert inputs & sizes[ll.LoRAConfig] and not inputs & sizes[ll.LoRAFAConfig]
    assert {(500, 2), (2, 500)} & sizes[ll.LoRAFAConfig]


def test_refusals():
    with pytest.raises(ConfigError, match="13 orthogonal rows"):
        adapted(ll.LoRAFAConfig(r=13), 12, 20)
    for config in (ll.MiLoRAConfig, ll.OLoRAConfig, ll.PiSSAConfig):
        with pytest.raises(ConfigError, match="rank 13"):
            adapted(config(r=13))
