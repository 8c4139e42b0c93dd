"""Precision of small algebra."""

from __future__ import annotations

import pytest
import torch

from lora_lite.ops.linalg import precise


@pytest.mark.parametrize(
    ("given", "used"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_precise_is_single_or_better(given, used):
    t = torch.randn(3, 5, dtype=torch.float64).to(given)
    assert precise(t).dtype == used
    assert torch.equal(precise(t), t.to(used))
