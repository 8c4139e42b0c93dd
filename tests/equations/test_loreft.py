"""LoReFT against h + Rᵀ(W h + b − R h), token by token, and the orthonormality of R while it trains."""

from __future__ import annotations

import torch

import lora_lite as ll
from lora_lite.ops.stiefel import orthonormal_rows
from tiny_blocks import edited


def gram_schmidt(T):
    rows = []
    for t in T:
        t = t - sum((t @ q) * q for q in rows)
        rows.append(t / t.norm())
    return torch.stack(rows)


def test_forward():
    for share in (True, False):
        block, h, new = edited(ll.LoReFTConfig(r=3, alpha=7, positions="f2+l3", share=share))
        want = h.clone()
        for row, (first, last) in enumerate((([0, 1], [4, 5, 6]), ([0], [2]))):
            for i in first + last:
                k = 0 if share or i in first else 1
                R = gram_schmidt(block.lora_R[k])
                W = R + block.lora_D[k]
                want[row, i] = h[row, i] + 7 / 3 * R.mT @ (W @ h[row, i] + block.lora_b[k] - R @ h[row, i])
        torch.testing.assert_close(new, want, atol=1e-10, rtol=0)


def test_orthonormal_rows():
    T = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    R = orthonormal_rows(T)
    torch.testing.assert_close(R[1], gram_schmidt(T[1]), atol=1e-12, rtol=0)
    torch.testing.assert_close(orthonormal_rows(R), R, atol=1e-12, rtol=0)  # the start stays what it is
    assert torch.autograd.gradcheck(orthonormal_rows, (T,))


def test_rows_stay_orthonormal_and_everything_learns():
    torch.manual_seed(0)
    model = ll.testing.toy()
    adapter = ll.attach(model, ll.LoReFTConfig(r=4, positions="all"))
    T = model.layers[0].lora_R[0]
    torch.testing.assert_close(T @ T.mT, torch.eye(4), atol=1e-6, rtol=0)
    start = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    optimizer = torch.optim.AdamW(adapter.param_groups(lr=0.05, weight_decay=0.1))
    batch = ll.testing.batches()[0]
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        if step == 0:
            assert all(p.grad.any() for n, p in adapter.named_parameters() if "lora_R" not in n)
        optimizer.step()
        losses.append(loss.item())
        R = orthonormal_rows(model.layers[1].lora_R[0])
        torch.testing.assert_close(R @ R.mT, torch.eye(4), atol=1e-6, rtol=0)
    assert losses[-1] < losses[0] - 0.05
    assert all((p - start[n]).abs().max() > 0.1 for n, p in adapter.named_parameters())
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0}


def test_a_gradient_through_everything():
    """Against autograd through the paper's formula, R from the same T."""
    block, h, _ = edited(ll.LoReFTConfig(r=3, alpha=7, positions="all"))
    T, D, b = (getattr(block, f"lora_{k}") for k in "RDb")
    g = torch.randn_like(h)
    mine = torch.autograd.grad(block(torch.zeros_like(h)), (T, D, b), g)
    bare = torch.zeros_like(h) + block.down(block.up(torch.zeros_like(h)).tanh())
    R = gram_schmidt(T[0])
    want = bare + 7 / 3 * (bare @ D[0].mT + b[0]) @ R
    for a, c in zip(mine, torch.autograd.grad(want, (T, D, b), g), strict=True):
        torch.testing.assert_close(a, c, atol=1e-10, rtol=0)
