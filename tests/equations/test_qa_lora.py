"""QA-LoRA against sums over groups."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from equations.helpers import adapted, dense_change, randomise


@pytest.mark.parametrize(("group", "G"), [(0, 10), (4, 4)])
def test_forward_and_factors(group, G):
    model, fc, x = adapted(ll.QALoRAConfig(r=3, alpha=7, group=group, dtype="float64"))
    y = model(x)
    with ll.active(model, None):
        assert torch.equal(model(x), y)
    randomise(model)
    want = torch.zeros(12, 20).double()
    for i in range(20):
        want[:, i] = 7 / 3 * fc.lora_B @ fc.lora_A[:, i // G]
    torch.testing.assert_close(dense_change(model), want.detach(), atol=1e-10, rtol=0)
    groups = dense_change(model).unflatten(1, (-1, G))
    torch.testing.assert_close(groups, groups[..., :1].expand_as(groups))  # what a zero point can hold
    ll.activate(model, None)
    ll.combine(model, {"default": 0.5}, name="half")
    torch.testing.assert_close(dense_change(model), 0.5 * want.detach(), atol=1e-10, rtol=0)


def test_a_group_that_does_not_fit_is_refused():
    with pytest.raises(ll.ConfigError, match="group=3 does not divide the 20"):
        adapted(ll.QALoRAConfig(group=3))
    with pytest.raises(ll.ConfigError, match="group"):
        ll.QALoRAConfig(group=-1)
