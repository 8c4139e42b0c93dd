"""HRA against the chain of dense reflections."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, randomise


def chain(fc, r):
    """H_1 H_2 ⋯ H_r, and the vectors."""
    U0 = [fc.lora_U0[i // 2] for i in range(r)]
    U = [u0 + fc.lora_U[i] for i, u0 in enumerate(U0)]
    if r % 2:
        U.insert(r - 1, U0[-1])  # the partner of the odd one stays where it started
    R = torch.eye(len(U[0])).double()
    for u in U:
        R = R @ (torch.eye(len(u)).double() - 2 * torch.outer(u, u) / (u @ u))
    return R, U


@pytest.mark.parametrize("r", [1, 2, 5, 6])
@pytest.mark.parametrize("side", ["input", "output"])
def test_forward(side, r):
    model, fc, x = adapted(ll.HRAConfig(r=r, side=side, dtype="float64"))
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    randomise(model)
    x.requires_grad_()
    R, _ = chain(fc, r)
    torch.testing.assert_close(R @ R.mT, torch.eye(len(R)).double())
    W, b = (fc.weight @ R, fc.bias) if side == "input" else (R @ fc.weight, R @ fc.bias)
    want = torch.stack([W @ row + b for row in x])
    torch.testing.assert_close(model(x), want, atol=1e-10, rtol=0)
    tensors = (x, fc.lora_U)
    for mine, other in zip(
        torch.autograd.grad((model(x) ** 2).sum(), tensors), torch.autograd.grad((want**2).sum(), tensors), strict=True
    ):
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-9)


def test_orthogonal_in_fp32_and_small_steps():
    """Norms hold to rounding for large vectors, and a tiny step has a tiny, proportional effect."""
    model, fc, x = adapted(ll.HRAConfig(r=6), dtype=torch.float32)
    start = {k: v.clone() for k, v in fc.state_dict().items()}
    y = model(x)
    change = []
    for scale in (1e-2, 1e-4, 1e-6):
        fc.load_state_dict(start)
        randomise(model, scale)
        change.append(float((model(x) - y).detach().norm()) / scale)
    assert change[0] == pytest.approx(change[1], rel=0.1) and change[1] == pytest.approx(change[2], rel=0.2)
    randomise(model, 10.0)
    seen = []
    handle = fc.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(x)
    handle.remove()
    torch.testing.assert_close(seen[0].norm(dim=-1), x.norm(dim=-1), atol=0, rtol=1e-6)


def test_penalty():
    model, fc, _ = adapted(ll.HRAConfig(r=4, orthogonality=0.3, dtype="float64"))
    randomise(model)
    U = [u / u.norm() for u in chain(fc, 4)[1]]
    want = 0.3 * sum((float(i == j) - U[i] @ U[j]) ** 2 for i in range(4) for j in range(4))
    torch.testing.assert_close(ll.penalty(model), want)
