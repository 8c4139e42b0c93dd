"""B4. Weights ruined by merging in low precision: the bits come back, and a quantised merge says what it costs."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from lora_lite.testing.case import randomise, run
from lora_lite.testing.toy import FakeQuantLinear, Snapshot
from methods import OF_EACH_KIND, every_method, merges


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_method(merges, quick=("lora", "dora", "road"))
def test_twenty_cycles_leave_the_bits(case, dtype):
    case = type(case)(case.variant, dtype, True, case.options)
    model, x = case.random(), case.x()
    before = Snapshot(model, x)
    for _ in range(20):
        ll.merge(model)
        assert not torch.equal(run(model, x), run(case.model(), x))
        ll.unmerge(model)
    assert not (d := before.difference(model)), d


def rounded(w, bits):
    """Codes of a few bits and a step per row, as the stand-in keeps them."""
    top = 2 ** (bits - 1) - 1
    step = w.abs().amax(1, keepdim=True) / top
    return (w / step).round().to(torch.int8), step


@pytest.mark.parametrize("bits", [8, 4])
@every_method(merges, quick=OF_EACH_KIND)
def test_packed_weights_are_merged_on_request_and_the_error_is_the_real_one(case, bits):
    model, x = case.model(kind=FakeQuantLinear), case.x()
    for layer in model.modules():
        if isinstance(layer, FakeQuantLinear):
            layer.weight.data, layer.scales = rounded(layer.dequantised(), bits)
    case.attach(model, dequantize=True)
    randomise(model)
    base = Snapshot(model, x)
    with pytest.raises(ll.WeightError, match="dequantize=True"):
        ll.merge(model)
    assert not (d := base.difference(model)), d
    want = run(model, x)
    with ll.active(model, None):
        bare = run(model, x)
    report = ll.merge(model, dequantize=True, check=x)
    got = run(model, x)
    assert len(report.dequantised) == 4
    assert report.logit_error == float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert report.effect == pytest.approx(float((want - bare).abs().max()), rel=1e-5)
    ll.unmerge(model)
    assert not (d := base.difference(model)), d
