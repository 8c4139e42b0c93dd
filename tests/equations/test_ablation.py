"""Directional ablation against (I − α v̂v̂ᵀ) h."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from steering import contrast_pairs, row_vectors
from tiny_blocks import edited


def test_forward():
    pairs = contrast_pairs()
    P, N = row_vectors(ll.testing.toy(dtype=torch.float64), "layers.0", pairs)
    v = P.mean(0) - N.mean(0)
    v = v / v.norm()
    for strength in (1.0, 0.3):
        _, h, new = edited(ll.AblationConfig(alpha=7, strength=strength), pairs)
        M = torch.eye(12).double() - strength * torch.outer(v, v)
        torch.testing.assert_close(new, h @ M.mT, atol=1e-10, rtol=0)
    _, h, new = edited(ll.AblationConfig(), pairs)
    assert (new @ v).abs().max() < 1e-12
    _, h, new = edited(ll.AblationConfig(positions="l1"), pairs)
    assert (new != h).any(-1).nonzero().tolist() == [[0, 6], [1, 2]]


def test_one_direction_for_all_blocks():
    pairs = contrast_pairs(dtype=torch.float32)
    own, one = ll.testing.toy(), ll.testing.toy()
    ll.attach(own, ll.AblationConfig(), pairs)
    ll.attach(one, ll.AblationConfig(source=-1), pairs)
    assert not torch.equal(own.layers[0].lora_v, own.layers[1].lora_v)
    assert all(torch.equal(block.lora_v, own.layers[1].lora_v) for block in one.layers)
    with pytest.raises(ll.ConfigError, match="chooses 2 blocks"):
        ll.attach(ll.testing.toy(), ll.AblationConfig(source=2), pairs)
