"""The LoRA family and PSOFT, against PEFT on a small Llama: the same tensors, the same logits and gradients."""

from __future__ import annotations

import peft
import pytest
import torch

import lora_lite as ll
import tiny_llm
from equations.helpers import Box, randomise

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
R, ALPHA = 4, 6.0


def pair(cfg, **options):
    """Our adapted model and PEFT's, from the same base."""
    mine = tiny_llm.model(seed=3)
    ll.attach(mine, cfg)
    randomise(mine, 0.1)
    options = {"r": R, "lora_alpha": ALPHA, "target_modules": list(NAMES), **options}
    return mine, peft.get_peft_model(tiny_llm.model(seed=3), peft.LoraConfig(**options))


def layers(mine, theirs):
    for path in ll.adapters(mine)["default"].targets:
        yield mine.get_submodule(path), theirs.base_model.model.get_submodule(path)


def compare(mine, theirs, gradients):
    """`gradients(layer, peft_layer)` yields (our gradient, theirs) after a backward pass."""
    ids = torch.arange(24).view(2, 12) % 60 + 4
    ours, other = mine(input_ids=ids, labels=ids), theirs(input_ids=ids, labels=ids)
    with ll.active(mine, None):
        bare = mine(input_ids=ids).logits
    assert (ours.logits - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours.logits, other.logits, atol=1e-5, rtol=1e-5)
    ours.loss.backward()
    other.loss.backward()
    n = 0
    for layer, peft_layer in layers(mine, theirs):
        for a, b in gradients(layer, peft_layer):
            assert a.abs().max() > 0
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
            n += 1
    assert n >= 14


def put(parameter, value):
    with torch.no_grad():
        parameter.copy_(value)


def lora_gradients(layer, other):
    yield layer.lora_A.grad, other.lora_A["default"].weight.grad
    yield layer.lora_B.grad, other.lora_B["default"].weight.grad


@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora(use_rslora):
    mine, theirs = pair(ll.LoRAConfig(r=R, alpha=ALPHA, use_rslora=use_rslora), use_rslora=use_rslora)
    for layer, other in layers(mine, theirs):
        put(other.lora_A["default"].weight, layer.lora_A)
        put(other.lora_B["default"].weight, layer.lora_B)
    compare(mine, theirs, lora_gradients)


def test_lora_fa():
    mine, theirs = pair(ll.LoRAFAConfig(r=R, alpha=ALPHA))
    for layer, other in layers(mine, theirs):
        put(other.lora_A["default"].weight, layer.lora_A)
        put(other.lora_B["default"].weight, layer.lora_B)
    assert not next(layers(mine, theirs))[0].lora_A.requires_grad
    compare(mine, theirs, lambda layer, other: [(layer.lora_B.grad, other.lora_B["default"].weight.grad)])


def test_lora_fa_makes_the_step_of_peft_s_optimiser():
    """PEFT corrects the gradient of B with (AAᵀ)⁻¹/s²; with orthogonal rows of A that is a number."""
    mine, theirs = pair(ll.LoRAFAConfig(r=R, alpha=ALPHA))
    layer, _ = next(layers(mine, theirs))
    correction = torch.linalg.inv(layer.lora_A @ layer.lora_A.mT)
    torch.testing.assert_close(correction, correction[0, 0] * torch.eye(R), atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_dora(use_rslora):
    mine, theirs = pair(ll.DoRAConfig(r=R, alpha=ALPHA, use_rslora=use_rslora), use_rslora=use_rslora, use_dora=True)
    for layer, other in layers(mine, theirs):
        put(other.lora_A["default"].weight, layer.lora_A)
        put(other.lora_B["default"].weight, layer.lora_B)
        put(other.lora_magnitude_vector["default"].weight, layer.lora_norm * (1 + layer.lora_m))

    def gradients(layer, other):
        yield from lora_gradients(layer, other)
        yield layer.lora_m.grad, other.lora_magnitude_vector["default"].weight.grad * layer.lora_norm  # m = ‖W‖ (1 + δ)

    compare(mine, theirs, gradients)


@pytest.mark.parametrize(
    "cfg, options",
    [
        (ll.PiSSAConfig(r=R, alpha=ALPHA), {"init_lora_weights": "pissa"}),
        (ll.OLoRAConfig(r=R, alpha=ALPHA), {"init_lora_weights": "olora"}),
    ],
    ids=["pissa", "olora"],
)
def test_starts_that_peft_subtracts_from_the_weight(cfg, options):
    mine, theirs = pair(cfg, **options)
    for layer, other in layers(mine, theirs):
        A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
        torch.testing.assert_close(B @ A, layer.lora_B0 @ layer.lora_A0, atol=1e-5, rtol=1e-4)
        put(A, layer.lora_A0 + layer.lora_A)
        put(B, layer.lora_B0 + layer.lora_B)
    compare(mine, theirs, lora_gradients)


def test_delora():
    """PEFT has the normalised product alone: ours is the difference of two of its adapters."""
    torch.manual_seed(6)
    mine, x, c = Box(20, 12, True, torch.float32), torch.randn(5, 20), torch.randn(5, 12)
    state = {k: v.clone() for k, v in mine.state_dict().items()}
    ll.attach(mine, ll.DeLoRAConfig(r=R, strength=5.0))
    randomise(mine, 0.1)
    fc, parts = mine.fc, []
    for A, B in ((fc.lora_A0 + fc.lora_A, fc.lora_B0 + fc.lora_B), (fc.lora_A0, fc.lora_B0)):
        base = Box(20, 12, True, torch.float32)
        base.load_state_dict(state)
        base.config = {"model_type": "box"}
        theirs = peft.get_peft_model(base, peft.DeloraConfig(r=R, target_modules=["fc"], delora_lambda=5))
        other = theirs.base_model.model.fc
        put(other.delora_A["default"], A)
        put(other.delora_B["default"], B)
        put(other.delora_lambda["default"], fc.lora_lambda)
        parts.append((other, theirs.base_model.model(x)))
    (other, new), (start, old) = parts
    with ll.active(mine, None):
        want = mine(x) + new - old
    y = mine(x)
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
    ((y * c).sum() + (want * c).sum()).backward()
    torch.testing.assert_close(fc.lora_A.grad, other.delora_A["default"].grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fc.lora_B.grad, other.delora_B["default"].grad, atol=1e-5, rtol=1e-4)
    live = other.delora_lambda["default"].grad + start.delora_lambda["default"].grad  # one λ on both halves
    torch.testing.assert_close(fc.lora_lambda.grad, live, atol=1e-4, rtol=1e-4)


def test_psoft():
    mine, _ = pair(ll.PSOFTConfig(r=R))
    theirs = peft.get_peft_model(
        tiny_llm.model(seed=3),
        peft.PsoftConfig(r=R, psoft_alpha=R, target_modules=list(NAMES), ab_svd_init="psoft_init"),
    )
    for layer, other in layers(mine, theirs):
        A, B = other._get_psoft_ab_cache_buffers("default")
        torch.testing.assert_close(B @ A, layer.lora_U * layer.lora_S @ layer.lora_V, atol=1e-5, rtol=1e-4)
        # the same singular vectors with the same signs
        other._set_psoft_ab_cache_buffers("default", layer.lora_V.clone(), layer.lora_U * layer.lora_S)
        R_ = other.psoft_R["default"]
        put(R_.weight, layer.lora_Q)
        put(R_.vector_a, 1 + layer.lora_a)
        put(R_.vector_b, 1 + layer.lora_b)

    def gradients(layer, other):
        R_ = other.psoft_R["default"]
        yield layer.lora_Q.grad, R_.weight.grad
        yield layer.lora_a.grad, R_.vector_a.grad
        yield layer.lora_b.grad, R_.vector_b.grad

    compare(mine, theirs, gradients)
