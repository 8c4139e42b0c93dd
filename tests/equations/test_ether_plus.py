"""ETHER+ against dense relaxed reflections on both sides."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise


def dense(fc, side):
    """blockdiag(I − û ûᵀ + v̂ v̂ᵀ)."""
    u0, du, dv = (getattr(fc, f"lora_{side}_{k}") for k in ("u0", "u", "v"))
    blocks = []
    for a, b in zip(u0 + du, u0 + dv, strict=True):
        blocks.append(torch.eye(len(a)) - torch.outer(a, a) / (a @ a) + torch.outer(b, b) / (b @ b))
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sides", ["both", "input"])
@pytest.mark.parametrize("n", [1, 4])
def test_forward(n, sides, bias):
    model, fc, x = adapted(ll.ETHERPlusConfig(n_blocks=n, sides=sides, dtype="float64"), bias=bias)
    model(x).square().sum().backward()
    assert all(bool(p.grad.abs().max() > 0) for p in ll.adapters(model)["default"].parameters())
    randomise(model)
    W = fc.weight @ dense(fc, "in")
    W = dense(fc, "out") @ W if sides == "both" else W
    torch.testing.assert_close(model(x), torch.nn.functional.linear(x, W, fc.bias), atol=1e-10, rtol=0)
    tensors = [x.requires_grad_(), *ll.adapters(model)["default"].parameters()]
    mine = torch.autograd.grad((model(x) ** 2).sum(), tensors)
    other = torch.autograd.grad((torch.nn.functional.linear(x, W, fc.bias) ** 2).sum(), tensors)
    for got, want in zip(mine, other, strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


def test_the_change_is_bounded_and_small_steps_are_small():
    model, fc, _ = adapted(ll.ETHERPlusConfig(sides="input", dtype="float64"))
    randomise(model, 100.0)
    assert float((dense(fc, "in") - torch.eye(20)).norm().detach()) <= 2
    change = []
    for scale in (1e-3, 1e-6, 1e-9):
        model, fc, _ = adapted(ll.ETHERPlusConfig(dtype="float64"))
        randomise(model, scale)
        change.append(float(dense_change(model).norm()) / scale)
    assert change[1] == pytest.approx(change[0], rel=1e-2) and change[2] == pytest.approx(change[1], rel=1e-5)
