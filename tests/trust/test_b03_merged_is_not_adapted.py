"""B3. A merged model that is not the adapted one: random tensors, alpha != r, every kind of dense layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.testing.case import randomise, run
from lora_lite.testing.toy import Conv1D
from methods import OF_EACH_KIND, every_method, merges


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@every_method(merges, quick=OF_EACH_KIND)
def test_logits_of_the_whole_model(case, bias, kind):
    case.bias = bias
    model, x = case.model(kind=kind), case.x()
    base = run(model, x)
    case.attach(model)
    randomise(model, scale=0.1)
    want = run(model, x)
    assert float((want - base).abs().max()) > 1e-3, "the test adapter does too little"
    ll.merge(model)
    assert float((run(model, x) - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert ll.merge(model).n_layers == 0
    assert float((run(model, x) - want).abs().max()) <= 1e-5 * float(want.abs().max())


@every_method(merges)
def test_bfloat16_departs_by_its_rounding_only(case):
    case = type(case)(case.variant, torch.bfloat16, True, case.options)
    model, x = case.random(scale=0.1), case.x()
    exact = run(case.model().float(), x.float())  # the scale of the outputs
    want = run(model, x).float()
    ll.merge(model)
    # two residual blocks: the weights' rounding, once, and those of four products
    assert float((run(model, x).float() - want).abs().max()) <= 12 * case.eps * float(exact.abs().max())


@every_method(merges, quick=OF_EACH_KIND)
def test_two_adapters_in_both_orders_are_both_active(case):
    x = case.x()
    for order in (("a", "b"), ("b", "a")):
        model = case.random("a", "b", scale=0.1)
        ll.activate(model, list(order))
        want = run(model, x)
        with ll.active(model, "a"):
            assert not torch.equal(run(model, x), want)
        ll.merge(model)
        assert float((run(model, x) - want).abs().max()) <= 1e-5 * float(want.abs().max())
