"""The pairs with PEFT that need a language model: both sides train the same numbers."""

from __future__ import annotations

import peft
import pytest
import torch

import lora_lite as ll
import tiny_llm
from lora_lite.bench.pairs import IN_A_MODEL, PAIRS, config, data, peft_model
from neighbours import needs


def test_no_method_stands_in_both_lists():
    assert not set(PAIRS) & set(IN_A_MODEL)


@needs("peft", "0.21", "newer prompts")
@pytest.mark.parametrize("method", IN_A_MODEL)
def test_both_sides_train_the_same_numbers(method):
    torch.manual_seed(0)
    mine, theirs = tiny_llm.model(width=64), tiny_llm.model(width=64)
    adapter = ll.attach(mine, config(method, 4), calibration_data=data(method, mine))
    other = peft_model(method, 4, theirs)
    assert isinstance(other, peft.PeftModel)
    assert adapter.num_parameters() == sum(p.numel() for p in other.parameters() if p.requires_grad)
