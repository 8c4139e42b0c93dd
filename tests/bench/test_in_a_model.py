"""The pairs with PEFT: both sides train the same numbers."""

from __future__ import annotations

import peft
import pytest
import torch

import lora_lite as ll
import tiny_llm
from lora_lite.bench import pairs
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


MORE_IN_PEFT = {"boft": "whole blocks, of which the skew halves act, and a gain per output"}
"""Method -> what PEFT trains beside the same function's parameters, or in their place."""


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of layers without a bias and of jit
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@needs("peft", "0.21", "newer methods")
@pytest.mark.parametrize("method", PAIRS)
def test_both_sides_of_a_pair_train_the_same_numbers(method, monkeypatch):
    """Or a ratio to PEFT compares two sizes: its OSF counts the triplets that it keeps, ours those that it trains."""
    monkeypatch.setitem(pairs.SIZES["S4"], "num_hidden_layers", 1)
    try:
        theirs = pairs.theirs("S4", method, 8)
    except ImportError as e:
        pytest.skip(str(e))
    if theirs is None:
        pytest.skip("PEFT cannot run it here")
    mine = ll.adapters(pairs.ours("S4", method, 8))["default"].num_parameters()
    n = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert mine < n if method in MORE_IN_PEFT else mine == n
