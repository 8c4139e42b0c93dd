"""A compacted adapter takes the place of the old one: same function, same flags, same selection, and the base goes on
as before."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import toy

X = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(4))


def nested(name="default", **changes):
    model = toy()
    model.head.weight.requires_grad_(False)
    ll.attach(model, ll.DyLoRAConfig(r=4, alpha=7, **changes), name=name)
    randomise(model, name)
    return model


@pytest.mark.parametrize("trainable", [True, False])
def test_it_trains_when_the_old_one_did(trainable):
    model = nested()
    ll.adapters(model)["default"].trainable = trainable
    handle = ll.compact(model, rank=2)
    assert handle.trainable is trainable
    assert {p.requires_grad for p in handle.parameters()} == {trainable}
    assert handle.num_parameters() == 2 * 2 * 2 * (12 + 20)


def test_the_function_is_that_of_the_first_ranks():
    model = nested()
    small = ll.adapter_state_dict(model)
    ll.compact(model, rank=2)
    for key, t in ll.adapter_state_dict(model).items():
        if key.endswith("lora_A"):
            assert torch.equal(t, small[key][:2])
        elif key.endswith("lora_B"):
            assert torch.equal(t, small[key][:, :2])
    layer = model.layers[0].up
    with torch.no_grad():
        y = layer(X)
        want = torch.nn.functional.linear(X, layer.weight, layer.bias) + 7 / 2 * X @ layer.lora_A.mT @ layer.lora_B.mT
    torch.testing.assert_close(y, want)


def test_the_selection_stays():
    model = nested("a")
    ll.attach(model, ll.LoRAConfig(r=3, alpha=7), name="b")
    randomise(model, "b")
    for choice in ("b", {"a": 0.5, "b": 2.0}, None):
        ll.activate(model, choice)
        before = dict(model._lora_lite_state.active)
        ll.compact(model, "a", rank=3)
        assert dict(model._lora_lite_state.active) == before
        assert ll.adapters(model)["a"].active == ("a" in before)


def test_the_base_gets_its_flags_back_in_the_end():
    model = nested()
    ll.compact(model, rank=1)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)
    ll.detach(model)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["head.weight"]


def test_without_a_schedule_that_ended_it_is_refused():
    model = nested()
    with pytest.raises(ll.StateError, match="schedule has not ended"):
        ll.compact(model)
    assert ll.adapters(model)["default"].cfg.r == 4
