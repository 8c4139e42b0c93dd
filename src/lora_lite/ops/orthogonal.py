"""Orthogonal maps near the identity, each as R − I, so that a zero parameter gives an exact zero and small ones lose
nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .autograd import own_backward, own_products


def full_precision(t: Tensor) -> AbstractContextManager[Any]:
    """A context in which small products keep t's dtype under autocast."""
    return (
        nullcontext() if t.is_meta else torch.autocast(t.device.type, enabled=False)
    )  # torch knows no autocast on meta


def skew(theta: Tensor, n: int) -> Tensor:
    """The skew-symmetric (..., n, n) whose upper triangle, row by row, is theta (..., n(n−1)/2)."""
    rows, cols = torch.triu_indices(n, n, 1, device=theta.device).unbind()
    upper = theta.new_zeros(*theta.shape[:-1], n * n).index_copy(-1, rows * n + cols, theta)
    upper = upper.unflatten(-1, (n, n))
    return upper - upper.mT


def _cayley(Q: Tensor) -> Tensor:
    """2(I−Q)⁻¹Q = 2(I−Q²)⁻¹(Q+Q²) by Cholesky, I−Q² being positive definite, and one step of refinement: quicker than
    LU, and closer."""
    n = Q.shape[-1]
    Q, shape = Q.reshape(-1, n, n), Q.shape
    with full_precision(Q):
        square = torch.bmm(Q, Q)
        M = torch.eye(n, dtype=Q.dtype, device=Q.device) - square
        D = 2 * torch.bmm(torch.cholesky_inverse(torch.linalg.cholesky_ex(M)[0]), Q + square)
        rest = torch.baddbmm(D, Q, D, beta=-1).add(Q, alpha=2)  # 2Q − (I−Q)D, and (I−Q)⁻¹ is nearly I + D/2
        return torch.baddbmm(rest, D, rest, alpha=0.5).add(D).view(shape)


class _Cayley(torch.autograd.Function):
    """With D = 2(I−Q)⁻¹Q we have (I−Q)⁻¹ = I + D/2, so dD = ½ (2I+D) dQ (2I+D): the backward pass needs two products
    and no solve."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        D = _cayley(Q)
        ctx.save_for_backward(D)
        return D

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (D,) = ctx.saved_tensors
        n, DT = D.shape[-1], D.mT.reshape(-1, *D.shape[-2:])
        with full_precision(D):
            half = torch.baddbmm(g.reshape(-1, n, n), g.reshape(-1, n, n), DT, alpha=0.5)
            return torch.baddbmm(half, DT, half, beta=2).view(D.shape)


def cayley_minus_identity(Q: Tensor) -> Tensor:
    """R − I = 2(I−Q)⁻¹Q for the rotation R = (I+Q)(I−Q)⁻¹ of a skew-symmetric Q (..., n, n); orthogonal to rounding for
    any Q."""
    if not own_backward():
        return _cayley(Q)
    return _Cayley.apply(Q)  # pyright: ignore[reportReturnType]


def neumann_minus_identity(Q: Tensor, terms: int) -> Tensor:
    """R − I ≈ 2(Q + … + Q^(k−2)) + Q^(k−1), the truncated series of k >= 3 terms; orthogonal only for small Q."""
    two = 2 * torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    D = Q + two
    with full_precision(Q):
        for _ in range(terms - 3):
            D = Q @ D + two
        return Q @ D


def _blocks(x: Tensor, n: int, b: int) -> Tensor:
    """x (..., n b) as n matrices (n, tokens, b), a view where x is contiguous."""
    return x.reshape(-1, n, b).transpose(0, 1)


class _AddBlocks(torch.autograd.Function):
    """Adds into one copy of x in its own layout, where autograd would transpose and add whole activations several
    times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, D: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, D)
        out = x.clone(memory_format=torch.contiguous_format)
        _blocks(out, *D.shape[:2]).baddbmm_(_blocks(x, *D.shape[:2]), D)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, D = ctx.saved_tensors
        gx = _AddBlocks.apply(g, D.mT) if ctx.needs_input_grad[0] else None
        gD = None
        if ctx.needs_input_grad[1]:
            gD = torch.bmm(_blocks(x, *D.shape[:2]).mT, _blocks(g, *D.shape[:2]))
        return gx, gD  # pyright: ignore[reportReturnType]


def add_blocks(x: Tensor, D: Tensor) -> Tensor:
    """x (I + blockdiag(D_1 … D_n)) for x (..., n b) and D (n, b, b)."""
    D = pack(D)
    if not own_backward():
        blocks = _blocks(x, *D.shape[:2])
        return torch.baddbmm(blocks, blocks, D).transpose(0, 1).reshape(x.shape)
    return _AddBlocks.apply(x, D)  # pyright: ignore[reportReturnType]


def pack(D: Tensor, width: int = 32) -> Tensor:
    """(n, b, b) as (n/k, kb, kb) block-diagonal matrices of a width up to `width`: a few zeros cost less than many tiny
    products."""
    n, b, _ = D.shape
    k = max(1, width // b)
    while n % k:
        k -= 1
    if k == 1:
        return D
    eye = torch.eye(k, dtype=D.dtype, device=D.device)[:, None, :, None]
    return (D.reshape(n // k, k, b, 1, b) * eye).reshape(n // k, k * b, k * b)


def add_butterfly(x: Tensor, D: Tensor, level: int) -> Tensor:
    """The factor of a block butterfly whose b-blocks join half-blocks that lie 2^level half-blocks apart. x (..., n b),
    D (n, b, b), n a multiple of 2^level.

    A segment of 2^level blocks holds 2·2^level half-blocks; block c of the segment acts on half-blocks c and c +
    2^level.
    """
    n, b, _ = D.shape
    halves = (-1, n >> level, 2, 1 << level, b // 2)
    joined = x.reshape(halves).transpose(2, 3).reshape(-1, n * b)
    turned = add_blocks(joined, D).view(-1, n >> level, 1 << level, 2, b // 2)
    return turned.transpose(2, 3).reshape(x.shape)


def _halves(t: Tensor, group: int) -> list[tuple[Tensor, Tensor]]:
    """Views (first, second) of the partners along the last dimension: halves of groups of that size, and of the smaller
    group that is left."""
    d = t.shape[-1]
    rest = d % group
    pairs = []
    if d - rest:
        whole = t[..., : d - rest].unflatten(-1, (-1, 2, group // 2))
        pairs.append((whole[..., 0, :], whole[..., 1, :]))
    if rest > 1:
        tail = t[..., d - rest :]
        pairs.append((tail[..., : rest // 2], tail[..., (rest + 1) // 2 :]))
    return pairs


def _join(pairs: list[tuple[Tensor, Tensor]], like: Tensor, group: int) -> Tensor:
    """The vector with these halves, the inverse of `_halves`; a coordinate without a partner gets 0."""
    d = like.shape[-1]
    parts = [torch.stack(pairs[0], 1).flatten()] if d >= group else []
    if d % group > 1:
        parts += [pairs[-1][0], like.new_zeros(d % 2), pairs[-1][1]]
    elif d % group:
        parts.append(like.new_zeros(1))
    return torch.cat(parts)


def _mix(y: Tensor, c: Tensor, s: Tensor, group: int) -> Tensor:
    """y + c y + s·partner(y)."""
    out = torch.addcmul(y, y, c)
    for (o1, o2), (y1, y2), (s1, s2) in zip(_halves(out, group), _halves(y, group), _halves(s, group), strict=True):
        o1.addcmul_(y2, s1)
        o2.addcmul_(y1, s2)
    return out


class _MixPairs(torch.autograd.Function):
    """Saves y once and no swapped copy of it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, c: Tensor, s: Tensor, group: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(y, c, s)
        ctx.group = group
        return _mix(y, c, s, group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, c, s = ctx.saved_tensors
        group = ctx.group
        gy = _mix(g, c, _join([(s2, s1) for s1, s2 in _halves(s, group)], s, group), group)
        if not ctx.needs_input_grad[1]:
            return gy, None, None, None
        pairs = zip(_halves(g, group), _halves(y, group), strict=True)
        n = y.dim() - 1
        gs = _join([(_sum(g1 * y2, n), _sum(g2 * y1, n)) for (g1, g2), (y1, y2) in pairs], s, group)
        return gy, _sum(g * y, n), gs, None


def _sum(t: Tensor, n: int) -> Tensor:
    """Over the first n dimensions; t itself for none, where torch would sum over all."""
    return t.sum(tuple(range(n))) if n else t


def mix_pairs(y: Tensor, c: Tensor, s: Tensor, group: int) -> Tensor:
    """y + c∘y + s∘partner(y), c and s (d,), or (n, 1, d) with vectors per row: a 2x2 map of each pair, as its
    difference from the identity.

    Coordinates of a group (first half, second half) are partners at distance group/2; what is left at the end is a
    smaller group. Its odd middle coordinate has the partner 0.
    """
    if c.dim() > 1 or not own_backward():
        return _mix(y, c, s, group)
    return _MixPairs.apply(y, c, s, group)  # pyright: ignore[reportReturnType]


def pair_layout(first: Tensor, second: Tensor, d: int, group: int) -> Tensor:
    """The (d,) vector whose pairs, in the order of the pairs, hold (first, second), each (⌈d/2⌉,). An odd coordinate
    takes the last of `first`."""
    rest = d % group
    n = (d - rest) // 2
    whole = torch.stack((first[:n].view(-1, group // 2), second[:n].view(-1, group // 2)), 1).flatten()
    return torch.cat((whole, first[n:], second[n : d // 2])) if rest else whole


class _UnitPair(torch.autograd.Function):
    """A backward pass of few small kernels, which gives u no gradient."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        unit, e = _unit_pair(u, delta)
        ctx.save_for_backward(u, delta)
        ctx.mark_non_differentiable(unit)
        ctx.set_materialize_grads(False)
        return unit, e

    @staticmethod
    def backward(ctx: Any, _: None, g: Tensor | None) -> tuple[None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if g is None:
            return None, None
        u, delta = ctx.saved_tensors
        moved = u + delta
        norm = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
        unit = moved / norm
        return None, torch.addcmul(g, unit, (g * unit).sum(-1, keepdim=True), value=-1) / norm


def unit_pair(u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """û = u/‖u‖ and e = (u+δ)/‖u+δ‖ − û along the last dimension, without cancellation: δ = 0 gives e = 0 bit for
    bit. The gradient goes to δ alone where u asks none."""
    if u.requires_grad or not own_products(delta):
        return _unit_pair(u, delta)
    return _UnitPair.apply(u, delta)  # pyright: ignore[reportReturnType]


def _unit_pair(u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    change = (torch.add(delta, u, alpha=2) * delta).sum(-1, keepdim=True)
    moved = (norm * norm + change).sqrt()
    unit = u / norm
    return unit, torch.addcmul(delta, unit, change / (norm + moved), value=-1) / moved


def householder_wy(V: Tensor) -> tuple[Tensor, Tensor]:
    """(V̂, M), both (r, d), with x H_r⋯H_1 = x − (x V̂ᵀ) M for the reflections H_i = I − 2 v̂_i v̂_iᵀ along the rows of
    V.

    M = T⁻¹V̂ with the triangular T = ½I + strict_lower(V̂V̂ᵀ): the compact WY form.
    """
    V = unit_rows(V)
    with full_precision(V):
        T = torch.tril(V @ V.mT, -1) + 0.5 * torch.eye(V.shape[0], dtype=V.dtype, device=V.device)
        return V, torch.linalg.solve_triangular(T, V, upper=False)


def householder_pairs(u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(Z, M), both (2p, d), with x H'_p H_p ⋯ H'_1 H_1 = x + (x Zᵀ) M, H_i along u_i and H'_i along u_i + δ_i; u, δ (p,
    d).

    With the unit vectors û and û + e, a pair is the rotation H H' = I + zᵀ K z for z = (û; e), K = [[−2s, 2−2s], [−2,
    −2]], s = ‖e‖². The product of the pairs is I + Zᵀ T Z, T = (I − K·strict_upper(Z Zᵀ))⁻¹K by blocks, and M = Tᵀ Z.
    Where δ = 0, e and the rows of M that belong to û are exact zeros: a fresh product is the identity bit for bit.
    """
    p, d = u.shape
    unit, e = unit_pair(u, delta)
    s = (e * e).sum(-1, keepdim=True)
    Z = torch.stack((unit, e), 1)
    with full_precision(Z):
        G = (Z.view(2 * p, d) @ Z.view(2 * p, d).mT).view(p, 2, p, 2)
        lower = G * torch.ones(p, p, dtype=G.dtype, device=G.device).tril(-1)[:, None, :, None]
        both = torch.cat((lower.view(p, 2, 2 * p), Z), -1)  # Kᵀ acts on both: Kᵀ (û; e) = −2 (sû + e; (s−1)û + e)
        first = both[:, 0] * s
        KT = -2 * torch.stack((first + both[:, 1], first - both[:, 0] + both[:, 1]), 1).view(2 * p, 2 * p + d)
        T = torch.eye(2 * p, dtype=G.dtype, device=G.device) - KT[:, : 2 * p]
        return Z.view(2 * p, d), torch.linalg.solve_triangular(T, KT[:, 2 * p :], upper=False, unitriangular=True)


def shorten(v: Tensor, bound: float) -> Tensor:
    """v / max(1, ‖v‖/bound) along the last dimension: the nearest vector of a length up to bound, smooth in v also at
    0."""
    return v * (bound / torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(bound))


def unit_rows(u: Tensor) -> Tensor:
    """Every row divided by its length."""
    return u / torch.linalg.vector_norm(u, dim=-1, keepdim=True)


def block_rows(u: Tensor) -> Tensor:
    """u (n, f) as the n rows of an (n, n f) matrix, row i on the columns of block i and zero elsewhere."""
    n = u.shape[0]
    return u if n == 1 else (u[:, None] * torch.eye(n, dtype=u.dtype, device=u.device)[..., None]).flatten(1)


def givens_tree(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """x times d − 1 rotations in levels: neighbours first, then the even coordinates in the same way. c = cosθ − 1 and
    s = sinθ, (d − 1,)."""
    n = x.shape[-1] // 2
    if n == 0:
        return x
    a, b, c1, s1 = x[..., : 2 * n : 2], x[..., 1 : 2 * n : 2], c[:n], s[:n]
    even, odd = a + (a * c1 - b * s1), b + (a * s1 + b * c1)
    if x.shape[-1] % 2:
        even = torch.cat((even, x[..., -1:]), -1)
    even = givens_tree(even, c[n:], s[n:])
    mixed = torch.stack((even[..., :n], odd), -1).flatten(-2)
    return torch.cat((mixed, even[..., n:]), -1) if x.shape[-1] % 2 else mixed
