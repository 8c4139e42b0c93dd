"""WaveFT against dense Haar transforms."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise


def haar(d):
    """Rows: sums of neighbours over √2, then differences; d rounded up to even."""
    d += d % 2
    H = torch.zeros(d, d).double()
    for p in range(d // 2):
        H[p, 2 * p] = H[p, 2 * p + 1] = H[d // 2 + p, 2 * p] = 0.5**0.5
        H[d // 2 + p, 2 * p + 1] = -(0.5**0.5)
    return H


@pytest.mark.parametrize(("d_in", "d_out"), [(20, 12), (15, 8), (9, 13)])
def test_forward(d_in, d_out):
    cfg = ll.WaveFTConfig(r=3, alpha=7, n=50, strength=4.0, dtype="float64")
    model, fc, x = adapted(cfg, d_in, d_out)
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    randomise(model)
    H_out, H_in = haar(d_out), haar(d_in)
    torch.testing.assert_close(H_in @ H_in.mT, torch.eye(len(H_in)).double())
    C = torch.zeros(len(H_out), len(H_in)).double()
    for c, (i, j) in zip(fc.lora_values, fc.lora_at.T, strict=True):
        C[i, j] = c.detach()
    want = 4 * (H_out.mT @ C @ H_in)[:d_out, :d_in]
    torch.testing.assert_close(dense_change(model, d_in), want, atol=1e-10, rtol=0)


def test_all_coefficients_at_most():
    _, fc, _ = adapted(ll.WaveFTConfig())
    assert fc.lora_values.shape == (240,)
    with pytest.raises(ll.ConfigError, match="strength=0"):
        ll.WaveFTConfig(strength=0)
