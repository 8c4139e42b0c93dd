"""Modules trained whole, against PEFT's modules_to_save and LN Tuning: the same values give the same logits, and gradients agree."""

from __future__ import annotations

import peft
import pytest
import torch

import lora_lite as ll
import tiny_llm
from equations.helpers import randomise

IDS = torch.arange(24).view(2, 12) % 60 + 4


def compare(mine, theirs, pairs):
    """`pairs`: (our trained difference, the base tensor, PEFT's trained tensor); PEFT's are set to base + difference."""
    with torch.no_grad():
        for delta, base, other in pairs:
            other.copy_(base + delta.view_as(base))
    ours, other = mine(input_ids=IDS, labels=IDS), theirs(input_ids=IDS, labels=IDS)
    with ll.active(mine, None):
        assert (mine(input_ids=IDS).logits - ours.logits).abs().max() > 1e-2
    torch.testing.assert_close(ours.logits, other.logits, atol=1e-5, rtol=1e-5)
    ours.loss.backward()
    other.loss.backward()
    for delta, _, p in pairs:
        assert delta.grad.abs().max() > 0
        torch.testing.assert_close(delta.grad.view_as(p), p.grad, atol=1e-6, rtol=1e-4)


def test_modules_to_save():
    mine = tiny_llm.model(seed=3)
    ll.attach(mine, ll.LoRAConfig(r=4, alpha=6, target_names=("q_proj",), train_modules=("lm_head", "model.norm")))
    randomise(mine, 0.1)
    options = dict(r=4, lora_alpha=6, target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm"])
    theirs = peft.get_peft_model(tiny_llm.model(seed=3), peft.LoraConfig(**options))
    pairs = []
    for path in ("lm_head", "model.norm"):
        layer, copy = mine.get_submodule(path), theirs.base_model.model.get_submodule(path)
        pairs.append((layer.lora_W, layer.weight, copy.modules_to_save["default"].weight))
    for path in ll.adapters(mine)["default"].targets:
        if path.endswith("q_proj"):
            layer, other = mine.get_submodule(path), theirs.base_model.model.get_submodule(path)
            with torch.no_grad():
                other.lora_A["default"].weight.copy_(layer.lora_A)
                other.lora_B["default"].weight.copy_(layer.lora_B)
    compare(mine, theirs, pairs)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_tuning_of_layer_norms():
    mine = tiny_llm.model(seed=3)
    handle = ll.attach(mine, ll.WholeConfig(target_kinds=("norm",)))
    randomise(mine, 0.1)
    names = sorted({path.rsplit(".", 1)[-1] for path in handle.targets})
    config = peft.LNTuningConfig(target_modules=names, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny_llm.model(seed=3), config)
    pairs = []
    for path in handle.targets:
        layer = mine.get_submodule(path)
        copy = theirs.base_model.model.get_submodule(path).ln_tuning_layers["default"]
        pairs.append((layer.lora_W, layer.weight, copy.weight))
    assert len(pairs) == 5
    compare(mine, theirs, pairs)
