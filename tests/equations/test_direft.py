"""DiReFT against h + W₂ᵀ(W₁ h + b), token by token."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from tiny_blocks import edited


@pytest.mark.parametrize("share", [True, False])
def test_forward(share):
    block, h, new = edited(ll.DiReFTConfig(r=3, alpha=7, positions="f2+l3", share=share))
    want = h.clone()
    for row, (first, last) in enumerate((([0, 1], [4, 5, 6]), ([0], [2]))):
        for i in first + last:
            k = 0 if share or i in first else 1
            want[row, i] += 7 / 3 * block.lora_W2[k].mT @ (block.lora_W1[k] @ h[row, i] + block.lora_b[k])
    torch.testing.assert_close(new, want, atol=1e-10, rtol=0)


def test_a_rank_beyond_the_stream_raises():
    with pytest.raises(ll.ConfigError, match="13 is more than the 12 dimensions"):
        ll.plan(ll.testing.toy(), ll.DiReFTConfig(r=13))
