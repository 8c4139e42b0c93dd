"""NoReFT against h + W₂ᵀ(W₁ h + b − W₂ h), token by token."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from tiny_blocks import edited


@pytest.mark.parametrize("share", [True, False])
def test_forward(share):
    block, h, new = edited(ll.NoReFTConfig(r=3, alpha=7, positions="f2+l3", share=share))
    want = h.clone()
    for row, (first, last) in enumerate((([0, 1], [4, 5, 6]), ([0], [2]))):
        for i in first + last:
            k = 0 if share or i in first else 1
            W2 = block.lora_W2[k]
            W1 = W2 + block.lora_D[k]
            want[row, i] += 7 / 3 * W2.mT @ (W1 @ h[row, i] + block.lora_b[k] - W2 @ h[row, i])
    torch.testing.assert_close(new, want, atol=1e-10, rtol=0)
