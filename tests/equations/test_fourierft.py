"""FourierFT against the inverse transform, written as a sum of waves."""

from __future__ import annotations

import math

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise


@pytest.mark.parametrize(("d_in", "d_out"), [(20, 12), (15, 7), (9, 16)])
def test_forward(d_in, d_out):
    cfg = ll.FourierFTConfig(r=3, alpha=7, n=30, strength=40.0, dtype="float64")
    model, fc, x = adapted(cfg, d_in, d_out)
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    randomise(model)
    want = torch.zeros(d_out, d_in).double()
    k, m = torch.arange(d_out).double()[:, None], torch.arange(d_in).double()
    for c, (i, j) in zip(fc.lora_values, fc.lora_at.T.tolist(), strict=True):
        want += 40 * c.detach() * torch.cos(2 * math.pi * (i * k / d_out + j * m / d_in)) / (d_in * d_out)
    torch.testing.assert_close(dense_change(model, d_in), want, atol=1e-10, rtol=0)


def test_all_coefficients_at_most():
    _, fc, _ = adapted(ll.FourierFTConfig())
    assert fc.lora_values.shape == (240,)
    with pytest.raises(ll.ConfigError, match="n=0"):
        ll.FourierFTConfig(n=0)
