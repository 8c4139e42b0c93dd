"""OFT against dense block-diagonal matrices."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise


def skew(theta, b):
    Q, entries = torch.zeros(b, b).double(), iter(theta)
    for i in range(b):
        for j in range(i + 1, b):
            Q[i, j] = next(entries)
    return Q - Q.mT


def rotation(Q, terms):
    eye = torch.eye(len(Q)).double()
    if not terms:
        return (eye + Q) @ torch.linalg.inv(eye - Q)
    power = [torch.linalg.matrix_power(Q, i) for i in range(terms)]
    return eye + 2 * sum(power[1:-1]) + power[-1]


def block_sizes(d, b):
    return [b] * (d // b) + ([d % b] if d % b else [])


def dense(fc, d, b, terms=0, bound=float("inf")):
    blocks = []
    tensors = [*getattr(fc, "lora_Q", []), *getattr(fc, "lora_tail", [])]
    for size, theta in zip(block_sizes(d, b), tensors + [torch.zeros(0)], strict=False):
        Q = skew(theta, size)
        blocks.append(rotation(Q * min(1.0, bound / max(float(Q.detach().norm()), 1e-30)), terms))
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("terms", [0, 3, 5, 6])
@pytest.mark.parametrize("b", [2, 3, 5, 20, 32])
def test_forward(b, terms):
    model, fc, x = adapted(ll.OFTConfig(block_size=b, neumann_terms=terms, dtype="float64"))
    randomise(model)
    x.requires_grad_()
    R = dense(fc, 20, b, terms)
    want = torch.nn.functional.linear(x @ R, fc.weight, fc.bias)
    torch.testing.assert_close(model(x), want, atol=1e-10, rtol=0)
    torch.testing.assert_close(fc.weight + dense_change(model), fc.weight @ R.mT, atol=1e-10, rtol=0)
    tensors = [x, *ll.adapters(model)["default"].parameters()]
    mine = torch.autograd.grad((model(x) ** 2).sum(), tensors)
    assert all(bool(g.abs().max() > 0) for g in mine)
    shift = 1e-6 * torch.randn_like(tensors[1])
    before = (model(x) ** 2).sum()
    tensors[1].data += shift
    slope = (torch.nn.functional.linear(x @ dense(fc, 20, b, terms), fc.weight, fc.bias) ** 2).sum() - before
    torch.testing.assert_close((mine[1] * shift).sum(), slope, rtol=1e-3, atol=1e-8)


def test_exact_map_is_orthogonal_and_the_series_is_not():
    for terms, orthogonal in ((0, True), (5, False)):
        model, fc, _ = adapted(ll.OFTConfig(block_size=8, neumann_terms=terms, dtype="float64"))
        randomise(model, 0.5)
        norms = (fc.weight + dense_change(model)).norm(dim=1) / fc.weight.norm(dim=1)
        assert bool((norms - 1).abs().max() < 1e-12) is orthogonal


@pytest.mark.parametrize("bound", [0.1, 100.0])
def test_bounded(bound):
    model, fc, x = adapted(ll.OFTConfig(block_size=8, max_norm=bound, dtype="float64"))
    model(x).sum().backward()
    assert all(bool(p.grad.isfinite().all() and p.grad.abs().max() > 0) for p in model.parameters() if p.requires_grad)
    randomise(model)
    R = dense(fc, 20, 8, bound=bound)
    assert bool(torch.linalg.matrix_norm(R - torch.eye(20)) < 2 * bound * 3**0.5 + 1e-9)
    torch.testing.assert_close(model(x), torch.nn.functional.linear(x @ R, fc.weight, fc.bias), atol=1e-10, rtol=0)


def test_one_input_has_nothing_to_rotate():
    with pytest.raises(ll.ConfigError, match=r"fc: .*exclude_names"):
        adapted(ll.OFTConfig(), d_in=1)
