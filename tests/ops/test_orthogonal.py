"""The written backward passes of rotations against finite differences, and maps against their slow definition, in
fp64."""

from __future__ import annotations

import pytest
import torch

from lora_lite.ops import orthogonal as ops


def draw(*shapes, scale=1.0):
    g = torch.Generator().manual_seed(5)
    return [(scale * torch.randn(*shape, generator=g, dtype=torch.float64)).requires_grad_() for shape in shapes]


def test_cayley():
    (theta,) = draw((2, 6))
    torch.autograd.gradcheck(lambda t: ops.cayley_minus_identity(ops.skew(t, 4)), (theta,))
    Q, eye = ops.skew(theta, 4), torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(ops.cayley_minus_identity(Q) + eye, (eye + Q) @ torch.linalg.inv(eye - Q))


@pytest.mark.parametrize("terms", [3, 5])
def test_neumann(terms):
    (theta,) = draw((1, 6), scale=0.1)
    Q = ops.skew(theta, 4)
    powers = [torch.linalg.matrix_power(Q, k) for k in range(1, terms)]
    want = 2 * torch.stack(powers[:-1]).sum(0) + powers[-1]
    torch.testing.assert_close(ops.neumann_minus_identity(Q, terms), want)


def test_blocks():
    x, D = draw((2, 3, 6), (3, 2, 2))
    torch.autograd.gradcheck(ops.add_blocks, (x, D))
    torch.testing.assert_close(ops.add_blocks(x, D), x + x @ torch.block_diag(*D))


@pytest.mark.parametrize("level", [0, 1])
def test_butterfly(level):
    x, D = draw((3, 8), (2, 4, 4))
    torch.autograd.gradcheck(lambda x, D: ops.add_butterfly(x, D, level), (x, D))
    apart, want = 2**level, x.clone()  # half-blocks of 2: c and c + apart are joined inside a segment
    for n, (c, other) in enumerate([(0, 1), (2, 3)] if apart == 1 else [(0, 2), (1, 3)]):
        at = [2 * c, 2 * c + 1, 2 * other, 2 * other + 1]
        want[:, at] = x[:, at] + x[:, at] @ D[n]
    torch.testing.assert_close(ops.add_butterfly(x, D, level), want)


@pytest.mark.parametrize(("d", "group"), [(8, 4), (7, 4), (7, 2), (5, 8)])
def test_pairs(d, group):
    y, c, s = draw((2, 3, d), (d,), (d,))
    torch.autograd.gradcheck(lambda y, c, s: ops.mix_pairs(y, c, s, group), (y, c, s))


def test_reflections():
    u, delta = draw((3, 7), (3, 7))
    torch.autograd.gradcheck(lambda u, d: torch.cat(ops.householder_pairs(u, d)), (u, delta))
    Z, M = ops.householder_pairs(u, delta)
    x, eye = torch.randn(2, 7, dtype=torch.float64), torch.eye(7, dtype=torch.float64)
    product = eye
    for a, b in zip(u, u + delta, strict=True):
        H, other = (eye - 2 * torch.outer(v, v) / v.dot(v) for v in (a, b))
        product = other @ H @ product
    torch.testing.assert_close(x + (x @ Z.mT) @ M, x @ product)


def test_short_vectors_stay_and_long_ones_end_at_the_bound():
    v = torch.tensor([[0.3, 0.4], [3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(ops.shorten(v, 2.0), torch.tensor([[0.3, 0.4], [1.2, 1.6], [0, 0]], dtype=torch.float64))


def test_givens():
    x, theta = draw((2, 7), (6,))
    pair, angle = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    turned = ops.givens_tree(pair, angle.cos() - 1, angle.sin())
    torch.testing.assert_close(turned, torch.stack((angle.cos(), angle.sin()), -1))  # counterclockwise
    torch.autograd.gradcheck(lambda x, t: ops.givens_tree(x, t.cos() - 1, t.sin()), (x, theta))


def test_unit_pair_is_the_change_of_a_direction():
    """In both passes, and in a second one; a zero change is an exact zero."""
    u = torch.randn(3, 7, dtype=torch.float64)
    delta = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    unit, e = ops.unit_pair(u, delta)
    torch.testing.assert_close(unit, u / u.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(e, (u + delta) / (u + delta).norm(dim=-1, keepdim=True) - unit)
    assert not unit.requires_grad
    torch.autograd.gradcheck(lambda d: ops.unit_pair(u, d)[1], (delta,))
    torch.autograd.gradgradcheck(lambda d: ops.unit_pair(u, d)[1], (delta,))
    assert ops.unit_pair(u, torch.zeros_like(delta))[1].count_nonzero() == 0
    both = u.clone().requires_grad_(True)
    torch.autograd.gradcheck(lambda u, d: torch.stack(ops.unit_pair(u, d)), (both, delta))
