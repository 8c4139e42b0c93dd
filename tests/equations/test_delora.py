"""DeLoRA against the normalised products, and the law of small steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from equations.helpers import Box, adapted, dense_change, randomise

R = 3


def normalised(B, A):
    return sum(torch.outer(B[:, i], A[i]) / (B[:, i].norm() * A[i].norm()) for i in range(A.shape[0]))


def test_forward_is_the_difference_of_normalised_products():
    model, fc, x = adapted(ll.DeLoRAConfig(r=R, alpha=7, strength=5.0, dtype="float64"))
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    randomise(model)
    w = torch.stack([fc.weight[:, j].norm() for j in range(20)])
    new, old = normalised(fc.lora_B0 + fc.lora_B, fc.lora_A0 + fc.lora_A), normalised(fc.lora_B0, fc.lora_A0)
    change = fc.lora_lambda / R * (new - old) * w
    torch.testing.assert_close(model(x), nn.functional.linear(x, fc.weight + change, fc.bias), atol=1e-10, rtol=0)
    for scale in (1.0, 100.0):
        randomise(model, scale)
        assert dense_change(model).norm() <= 2 * fc.lora_lambda.abs() * w.max()
    (model(x) ** 2).sum().backward()
    assert fc.lora_lambda.grad.abs() > 0
    fc.lora_lambda.data.zero_()
    assert torch.equal(model(x), y)  # no strength, no change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_changes_the_weight_in_proportion_to_the_learning_rate(dtype):
    changes = []
    for lr in (1e-2, 1e-3, 1e-4, 1e-5):
        torch.manual_seed(3)
        model, x = Box(64, 48, False, dtype), torch.randn(9, 64).to(dtype)
        handle = ll.attach(model, ll.DeLoRAConfig(r=4))
        optimizer = torch.optim.AdamW(handle.param_groups(lr, weight_decay=0.1))
        (model(x).float() ** 2).sum().backward()
        assert model.fc.lora_lambda.grad.item() == 0  # both halves are equal
        optimizer.step()
        model.to(torch.float64)
        changes.append(dense_change(model, 64).norm().item() / lr)
    assert max(changes) < 1.25 * min(changes)
    assert changes[-1] == pytest.approx(changes[-2], rel=1e-2) and changes[-1] > 0
