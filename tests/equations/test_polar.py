"""PoLAR: orthonormal starts, the update, and the penalty whose gradient is a term of the landing field."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise


def test_start_forward_and_penalty():
    model, fc, x = adapted(ll.PoLARConfig(r=3, alpha=7, orthogonality=0.4, dtype="float64"))
    y, eye = model(x), torch.eye(3).double()
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    torch.testing.assert_close(fc.lora_X.mT @ fc.lora_X, eye)
    torch.testing.assert_close(fc.lora_Y @ fc.lora_Y.mT, eye)
    assert ll.penalty(model).item() < 1e-20
    randomise(model)
    X, T, Y = fc.lora_X, fc.lora_T, fc.lora_Y
    want = 7 / 3 * sum(T[i, k] * torch.outer(X[:, i], Y[k]) for i in range(3) for k in range(3))
    torch.testing.assert_close(dense_change(model), want.detach(), atol=1e-10, rtol=0)
    at_X, at_Y = torch.autograd.grad(ll.penalty(model), (X, Y))
    torch.testing.assert_close(at_X, 0.4 * X @ (X.mT @ X - eye))
    torch.testing.assert_close(at_Y, 0.4 * (Y @ Y.mT - eye) @ Y)


def test_values_that_make_no_sense_are_refused():
    with pytest.raises(ll.ConfigError, match="rank 13"):
        adapted(ll.PoLARConfig(r=13))
    with pytest.raises(ll.ConfigError, match="orthogonality"):
        ll.PoLARConfig(orthogonality=float("nan"))
