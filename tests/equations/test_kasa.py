"""KaSA: the truncated base, the update and the penalty."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise


def test_start_forward_and_penalty():
    model, fc, _ = adapted(ll.KaSAConfig(r=3, alpha=7, beta=0.3, gamma=0.2, dtype="float64"))
    U, S, Vh = torch.linalg.svd(fc.weight, full_matrices=False)
    lost = (U[:, -3:] * S[-3:]) @ Vh[-3:]
    torch.testing.assert_close(dense_change(model), -lost, atol=1e-10, rtol=0)
    randomise(model)
    A, B, values = fc.lora_A, fc.lora_B, fc.lora_values
    want = 7 / 3 * sum(values[k] * torch.outer(B[:, k], A[k]) for k in range(3)) - lost
    torch.testing.assert_close(dense_change(model), want.detach(), atol=1e-10, rtol=0)
    eye = torch.eye(3).double()
    apart = ((B.mT @ B - eye) ** 2).sum().sqrt() + ((A @ A.mT - eye) ** 2).sum().sqrt()
    torch.testing.assert_close(ll.penalty(model), 0.3 * (values**2).sum() + 0.2 * apart)


def test_dropout_leaves_what_the_base_loses():
    """In training, a fresh adapter is the truncated base whatever is dropped, and the update is right on average."""
    model, fc, x = adapted(ll.KaSAConfig(r=3, alpha=7, dropout=0.5, dtype="float64"))
    lost = fc.lora_B0 @ fc.lora_A0
    truncated = x @ (fc.weight - lost).mT + fc.bias
    torch.testing.assert_close(model.train()(x), truncated, atol=1e-10, rtol=0)
    randomise(model)
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([model(x) for _ in range(4000)]) - truncated
    want = 7 / 3 * (x @ fc.lora_A.mT * fc.lora_values) @ fc.lora_B.mT
    assert ((draws.mean(0) - want).abs() < 5 * draws.std(0) / 4000**0.5).all()


def test_values_that_make_no_sense_are_refused():
    with pytest.raises(ll.ConfigError, match="rank 12 leaves nothing"):
        adapted(ll.KaSAConfig(r=12))
    with pytest.raises(ll.ConfigError, match="gamma"):
        ll.KaSAConfig(gamma=-1)
