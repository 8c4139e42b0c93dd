"""SHiRA: distinct positions that are drawn evenly, and the update at them."""

from __future__ import annotations

import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise
from lora_lite.variants._sparse import distinct


def test_forward():
    model, fc, x = adapted(ll.SHiRAConfig(r=3, alpha=7, dtype="float64"))
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    assert fc.lora_values.shape == (3 * 32,) and len(set(map(tuple, fc.lora_at.T.tolist()))) == 3 * 32
    randomise(model)
    want = torch.zeros(12, 20).double()
    for value, (i, j) in zip(fc.lora_values, fc.lora_at.T, strict=True):
        want[i, j] = value
    torch.testing.assert_close(dense_change(model), want.detach(), atol=1e-10, rtol=0)
    _, fc, _ = adapted(ll.SHiRAConfig(r=8))
    assert len(fc.lora_values) == 240  # no more than there are


def test_positions_are_distinct_and_even():
    for total, n in ((50, 40), (1000, 20)):  # by permutation, by rejection
        g = torch.Generator().manual_seed(1)
        draws = [distinct(total, n, g) for _ in range(2000)]
        assert all(len(d) == n and bool((d.diff() > 0).all()) for d in draws)
        counts = torch.bincount(torch.cat(draws), minlength=total).double()
        mean = 2000 * n / total
        assert float(((counts - mean) ** 2).mean()) < 1.5 * mean  # about Poisson, or less
        assert counts.max() < mean + 6 * mean**0.5
