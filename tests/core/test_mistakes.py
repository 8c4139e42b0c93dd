"""What people pass by mistake: one sentence that names the line to type instead."""

from __future__ import annotations

import copy
import pickle

import pytest
from torch import nn

import lora_lite as ll


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 7))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ll.LoRAConfig(lora_alpha=16), "has no field 'lora_alpha'. Here it is called 'alpha'"),
        (lambda: ll.LoRAConfig(target_modules=["q"]), "Here it is called 'target_names'"),
        (lambda: ll.LoRAConfig(alhpa=16), "Did you mean 'alpha'"),
        (lambda: ll.LoRAConfig(8), r"by name: LoRAConfig\(r=8\)"),
        (lambda: ll.LoRAConfig(target_names="all-linear"), "'all-linear' is what None, the default, means"),
        (lambda: ll.attach(model(), {"r": 8}), r"got dict"),
        (lambda: ll.attach(model(), "dora"), r"lora_lite.DoRAConfig\(\), got the name 'dora'"),
        (lambda: ll.attach(model(), ll.LoRAConfig), r"LoRAConfig\(r=8\), got the class"),
        (lambda: ll.attach(ll.LoRAConfig(), model()), "first argument is the model"),
        (lambda: ll.plan(object(), ll.LoRAConfig()), "first argument is the model, a torch.nn.Module, got object"),
        (lambda: ll.load("tokenizer", "a.safetensors"), "first argument is the model"),
        (lambda: ll.merge("tokenizer"), "first argument is the model"),
        (lambda: ll.save("tokenizer", "a.safetensors"), "first argument is the model"),
    ],
)
def test_a_mistake_is_one_sentence(call, says):
    with pytest.raises(ll.ConfigError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_configs_are_still_copied_and_pickled():
    cfg = ll.LoRAConfig(r=3, alpha=5)
    assert copy.deepcopy(cfg) == pickle.loads(pickle.dumps(cfg)) == cfg


def test_what_has_no_effect_or_is_too_large_is_said_by_the_plan():
    notes = "\n".join(ll.plan(model(), ll.IA3Config(alpha=16, target_names="0")).notes)
    assert "alpha=16.0 has no effect: ia3 does not use it" in notes
    assert "above the width" in "\n".join(ll.plan(model(), ll.LoRAConfig(r=64, target_names=".*")).notes)
    assert ll.plan(model(), ll.LoRAConfig(r=2, alpha=5, target_names=".*")).notes == []
