"""PCA steering: the top direction of the uncentred differences, by power iteration, and its sign."""

from __future__ import annotations

import torch

import lora_lite as ll
from steering import contrast_pairs, row_vectors
from tiny_blocks import edited


def test_forward():
    pairs = contrast_pairs()
    P, N = row_vectors(ll.testing.toy(dtype=torch.float64), "layers.0", pairs)
    D = P - N
    v = torch.ones(12, dtype=torch.float64)
    for _ in range(4000):
        v = D.mT @ (D @ v)
        v /= v.norm()
    if sum(1 if d @ v > 0 else -1 for d in D) < 0:
        v = -v
    m = sum(abs(d @ v) for d in D) / len(D)
    block, h, new = edited(ll.PCASteeringConfig(alpha=7, strength=1.7), pairs)
    torch.testing.assert_close(new, h + 1.7 * m * v, atol=1e-8, rtol=0)
    mean = D.mean(0)
    assert (
        block.lora_v @ mean / mean.norm() > 0.9
    )  # the common shift is what is found; a centred PCA would have lost it
    centred = torch.linalg.svd(D - mean).Vh[0]
    assert abs(centred @ mean) / mean.norm() < 0.5


def test_swapped_sides_turn_the_direction():
    pairs = contrast_pairs()
    block, h, new = edited(ll.PCASteeringConfig(), pairs)
    _, _, other = edited(ll.PCASteeringConfig(), [(b, a) for a, b in pairs])
    torch.testing.assert_close(new - h, h - other, atol=1e-10, rtol=0)
