"""A frozen copy of an adapter beside it."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
import shared_methods
import tiny_models
from lora_lite.runtime.model.state import state_of
from lora_lite.runtime.twin import frozen_copy
from lora_lite.testing.case import randomise

IDS = torch.arange(10).view(2, 5)
CONFIGS = {
    "lora": lambda: ll.LoRAConfig(r=3, alpha=7, train_modules=("lm_head",)),
    "hra": lambda: ll.HRAConfig(r=2),
    "lokr": lambda: ll.LoKrConfig(r=2),  # torch multiplies by a matrix otherwise where it trains
    "shared": lambda: ll.AdapterConfig(variant=shared_methods.bank().name, r=3, alpha=7),
}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("method", CONFIGS)
def test_the_copy_is_what_the_adapter_was(method):
    model = tiny_models.build("llama").eval()
    ll.attach(model, ll.LoRAConfig(r=2, alpha=3), name="first")
    ll.attach(model, CONFIGS[method](), name="second")
    ll.attach(model, ll.LoRAConfig(r=2, alpha=3), name="third")
    for i, name in enumerate(("first", "second", "third")):
        randomise(model, name, seed=i)
    ll.activate(model, {"first": 0.5, "second": 0.7})
    want = logits(model)
    copy = frozen_copy(model, "second", "was")
    assert not copy.trainable and not copy.active and torch.equal(logits(model), want)
    assert list(ll.adapters(model)) == ["first", "second", "was", "third"]
    assert not [n for n, p in model.named_parameters() if n.endswith("@was") and p.requires_grad]
    randomise(model, "second", seed=9)
    assert not torch.equal(logits(model), want)
    with ll.active(model, {"first": 0.5, "was": 0.7}):
        assert torch.equal(logits(model), want)
    ll.detach(model, "was")
    assert list(ll.adapters(model)) == ["first", "second", "third"]


def test_a_taken_name_leaves_everything_as_it_was():
    model = tiny_models.build("llama")
    for name in ("a", "b"):
        ll.attach(model, ll.LoRAConfig(r=2, alpha=3), name=name)
    keys = list(model.state_dict())
    with pytest.raises(ll.StateError, match="'b' is attached already"):
        frozen_copy(model, "a", "b")
    assert list(model.state_dict()) == keys and state_of(model).active == (("b", 1.0),)
