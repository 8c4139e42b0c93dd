"""The peak on tensors without values is what torch's allocator hands out for a step on real ones."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from lora_lite.bench import memory, pairs, speed

MASK = 4 * 64 * 64 * 8
"""transformers builds a causal mask, and what it takes on the way, where it sees no values."""


@pytest.mark.parametrize("method", ["lora", "hra", "ia3"])
def test_the_peak_is_that_of_the_allocator(method):
    model = pairs.ours("tiny", method, 3).train()
    before = {name: p for name, p in model.named_parameters()}
    real = speed.peak_bytes(model, torch.zeros(2, 64, dtype=torch.long))
    assert memory.peak(model, 2, 64) == pytest.approx(real, rel=0.01, abs=MASK)
    assert all(p is before[name] for name, p in model.named_parameters())


def test_live_counts_what_is_alive():
    x = torch.ones(1000)
    with memory.Live(torch.nn.Linear(2, 2)) as live:
        y = x * 2  # 4,000 bytes, and 4,000 more
        z = y + 1
        del y
        w = z.view(10, 100)  # nothing new
        del z
        w = w * 3
    assert live.peak == 8000
