"""PiSSA against the paper's residual weight, and its promises about the decomposition."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise

R, ALPHA = 3, 7.0


@pytest.mark.parametrize("alpha", [ALPHA, -ALPHA])
def test_forward_is_lora_on_the_residual_weight(alpha):
    model, fc, x = adapted(ll.PiSSAConfig(r=R, alpha=alpha, dtype="float64"))
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    s = alpha / R
    U, S, Vh = torch.linalg.svd(fc.weight)
    residual = fc.weight - sum(S[k] * torch.outer(U[:, k], Vh[k]) for k in range(R))
    torch.testing.assert_close(fc.weight - s * fc.lora_B0 @ fc.lora_A0, residual, atol=1e-10, rtol=0)
    torch.testing.assert_close((fc.lora_A0**2).sum(1) * abs(s), S[:R], atol=1e-10, rtol=0)  # √S on either side
    torch.testing.assert_close((fc.lora_B0**2).sum(0) * abs(s), S[:R], atol=1e-10, rtol=0)
    randomise(model)
    A, B = fc.lora_A0 + fc.lora_A, fc.lora_B0 + fc.lora_B
    want = x @ (residual + s * B @ A).mT + fc.bias
    torch.testing.assert_close(model(x), want, atol=1e-10, rtol=0)


@pytest.mark.parametrize("shape", [(200, 300), (300, 200), (13, 7), (7, 13)])
def test_randomised_is_near_the_exact_one_and_reproducible(shape):
    torch.manual_seed(2)
    W = torch.randn(shape, dtype=torch.float64) * 0.7 ** torch.arange(shape[1])
    products = []
    for kind in ("exact", "randomised", "randomised"):
        layer = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64)
        layer.weight.data.copy_(W)
        ll.attach(layer, ll.PiSSAConfig(r=4, svd=kind, niter=8, dtype="float64", target_names=(".*",)))
        products.append((layer.lora_A0, layer.lora_B0))
    (A, B), (A1, B1), (A2, B2) = products
    assert torch.equal(A1, A2) and torch.equal(B1, B2)
    torch.testing.assert_close(B1 @ A1, B @ A, atol=1e-4 * float(W.norm()), rtol=0)
    torch.testing.assert_close(A1, A, atol=1e-2, rtol=0)  # the signs agree too
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(B @ A, (U[:, :4] * S[:4]) @ Vh[:4], atol=1e-8, rtol=0)


def test_the_change_survives_small_steps():
    """In fp32 a step of 1e-7 must not drown in the difference of two products."""
    model, fc, _ = adapted(ll.PiSSAConfig(r=R, alpha=ALPHA), dtype=torch.float32)
    randomise(model, scale=1e-7)
    s, A0, B0 = ALPHA / R, fc.lora_A0.double(), fc.lora_B0.double()
    A, B = A0 + fc.lora_A.double(), B0 + fc.lora_B.double()
    x = torch.zeros(1, 20)
    x[0, 4] = 1
    fc.bias.data.zero_()
    fc.weight.data[:, 4] = 0  # so that y itself rounds nothing away
    want = s * (B @ A - B0 @ A0)[:, 4]
    torch.testing.assert_close(model(x)[0].double(), want, rtol=1e-4, atol=1e-12)
    assert dense_change(model).norm() > 0
