"""MoRA against its chunks, one by one."""

from __future__ import annotations

import math

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, randomise


def turned(chunk, place):
    """The rotary embedding of a position, pair by pair."""
    half, out = len(chunk) // 2, chunk.clone()
    for j in range(half):
        a = place * 10000 ** (-2 * j / len(chunk))
        out[j] = chunk[j] * math.cos(a) - chunk[j + half] * math.sin(a)
        out[j + half] = chunk[j + half] * math.cos(a) + chunk[j] * math.sin(a)
    return out


@pytest.mark.parametrize(("d_in", "d_out"), [(23, 50), (50, 23), (40, 50), (30, 31)])
@pytest.mark.parametrize("chunks", ["rotated", "summed"])
def test_forward(chunks, d_in, d_out):
    model, fc, x = adapted(ll.MoRAConfig(r=2, alpha=7, chunks=chunks, dtype="float64"), d_in, d_out)
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    randomise(model)
    q = len(fc.lora_M)
    assert q in (round((2 * (d_in + d_out)) ** 0.5), round((2 * (d_in + d_out)) ** 0.5) - 1)
    for row, base, got in zip(x, y, model(x), strict=True):
        parts = [[row[i % d_in] for i in range(start, start + q)] for start in range(0, d_in, q)]
        parts = [torch.stack(part) for part in parts]
        if chunks == "summed":
            out = fc.lora_M @ sum(parts)
        else:
            out = torch.cat([fc.lora_M @ turned(part, i) for i, part in enumerate(parts)])
        want = torch.stack([base[j] + out[j % len(out)] for j in range(d_out)])
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_a_chunk_is_no_wider_than_the_layer():
    _, fc, _ = adapted(ll.MoRAConfig(r=16), d_in=21)
    assert fc.lora_M.shape == (20, 20)
