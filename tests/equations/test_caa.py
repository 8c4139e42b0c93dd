"""CAA against h + α (mean h⁺ − mean h⁻)."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from steering import contrast_pairs, row_vectors
from tiny_blocks import edited


@pytest.mark.parametrize("token", ["last", "mean"])
def test_forward(token):
    pairs = contrast_pairs()
    P, N = row_vectors(ll.testing.toy(dtype=torch.float64), "layers.0", pairs, token)
    v = sum(P) / len(P) - sum(N) / len(N)
    block, h, new = edited(ll.CAAConfig(alpha=7, strength=-1.7, token=token), pairs)
    torch.testing.assert_close(new, h - 1.7 * v, atol=1e-10, rtol=0)
    torch.testing.assert_close(block.lora_v.norm(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(block.lora_norm, v.norm().reshape(1))
    for positions, columns in (("prompt", (range(7), range(3))), ("generated", ((), range(3, 7)))):
        _, h, new = edited(ll.CAAConfig(positions=positions, token=token), pairs)
        want = h.clone()
        for row, chosen in enumerate(columns):
            for i in chosen:
                want[row, i] += v
        torch.testing.assert_close(new, want, atol=1e-10, rtol=0)
