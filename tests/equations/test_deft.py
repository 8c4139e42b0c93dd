"""DEFT against the dense weight, on a bias too."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, randomise


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("projection", ["relu", "qr"])
def test_forward(projection, bias):
    model, fc, x = adapted(ll.DEFTConfig(r=3, alpha=7, projection=projection, dtype="float64"), bias=bias)
    y, s = model(x), 7 / 3
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    randomise(model)

    def parts(P):
        return (P, P.clamp_min(0)) if projection == "relu" else (torch.linalg.qr(P).Q,) * 2

    (_, T0), (Q, T) = parts(fc.lora_P0), parts(fc.lora_P0 + fc.lora_P)
    R = T0.mT @ fc.weight / s + fc.lora_R
    W = (torch.eye(12).double() - Q @ T.mT) @ fc.weight + s * Q @ R
    torch.testing.assert_close(model(x), torch.nn.functional.linear(x, W, fc.bias), atol=1e-10, rtol=0)


def test_a_rank_that_is_too_large_is_refused():
    with pytest.raises(ll.ConfigError, match="rank 13 is more than the 12 outputs"):
        adapted(ll.DEFTConfig(r=13))
