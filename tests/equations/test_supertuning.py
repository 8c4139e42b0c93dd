"""Super-Tuning against the weight, entry by entry."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("low_rank", [True, False])
def test_forward(low_rank, largest):
    cfg = ll.SuperTuningConfig(share=0.1, r=3, alpha=7, low_rank=low_rank, largest=largest, dtype="float64")
    model, fc, x = adapted(cfg)
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    chosen = sorted((float(w.abs()) for w in fc.weight.flatten()), reverse=largest)[:24]
    at = fc.lora_at.mT.tolist()
    assert sorted((float(fc.weight[i, j].abs()) for i, j in at), reverse=largest) == chosen
    randomise(model)
    want = torch.zeros(12, 20).double()
    for k, (i, j) in enumerate(at):
        want[i, j] = fc.lora_values[k]
    if low_rank:
        want = want + 7 / 3 * fc.lora_B @ fc.lora_A
    torch.testing.assert_close(dense_change(model), want.detach(), atol=1e-10, rtol=0)


def test_shares_that_mean_nothing():
    with pytest.raises(ll.ConfigError, match="share"):
        ll.SuperTuningConfig(share=0.0)
    with pytest.raises(ll.ConfigError, match="leaves no entry of a 20->12 weight"):
        adapted(ll.SuperTuningConfig(share=1e-3))
