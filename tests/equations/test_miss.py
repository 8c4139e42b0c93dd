"""MiSS against the sum over its pieces."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, randomise


@pytest.mark.parametrize("mini", [None, 4])
@pytest.mark.parametrize("r", [5, 7])  # divides the 20 inputs, and does not
def test_forward_and_factors(r, mini):
    model, fc, x = adapted(ll.MiSSConfig(r=r, alpha=9, mini=mini, dtype="float64"))
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    randomise(model)
    want = y.clone()
    for j in range(12):
        for i in range(20):
            want[:, j] += fc.lora_D[i % r, j % (mini or 12)] * x[:, i]
    torch.testing.assert_close(model(x), want, atol=1e-10, rtol=0)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ll.ConfigError, match="21 is more than the 20 inputs"):
        adapted(ll.MiSSConfig(r=21))
    with pytest.raises(ll.ConfigError, match="mini=5 does not divide the 12"):
        adapted(ll.MiSSConfig(r=4, mini=5))
    with pytest.raises(ll.ConfigError, match="mini"):
        ll.MiSSConfig(mini=0)
