"""ETHER against dense block-diagonal reflections."""

from __future__ import annotations

import math

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise


@pytest.mark.parametrize("n", [1, 4])
def test_forward(n):
    model, fc, x = adapted(ll.ETHERConfig(n_blocks=n, dtype="float64"))
    for step in range(2):
        H = torch.block_diag(*(torch.eye(20 // n) - 2 * torch.outer(u, u) / (u @ u) for u in fc.lora_u))
        want = torch.nn.functional.linear(x @ H, fc.weight, fc.bias)
        torch.testing.assert_close(model(x), want, atol=1e-10, rtol=0)
        torch.testing.assert_close((fc.weight + dense_change(model)).norm(dim=1), fc.weight.norm(dim=1))
        assert (H - torch.eye(20)).norm().item() == pytest.approx(2 * n**0.5)  # at the start as after any step
        randomise(model, 10.0**step)


def test_departure_is_declared_and_bad_blocks_are_named():
    assert not ll.get_variant("ether").exact_identity and ll.get_variant("ether").identity_bound == math.inf
    with pytest.raises(ll.ConfigError, match="fc: n_blocks=3 does not divide the 20 inputs"):
        adapted(ll.ETHERConfig(n_blocks=3))
