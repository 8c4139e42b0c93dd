"""Token rows against PEFT's TrainableTokens on a tied and an untied model: the same rows give the same logits and
gradients."""

from __future__ import annotations

import peft
import pytest
import torch

import lora_lite as ll
import tiny_models
from equations.helpers import randomise

IDS = torch.arange(24).view(2, 12) % 60 + 4
TOKENS = [5, 9, 40]


@pytest.mark.filterwarnings("ignore:Model has `tie_word:UserWarning")
@pytest.mark.parametrize("tie", [True, False])
def test_parity(tie):
    mine = tiny_models.build("llama", tie_word_embeddings=tie)
    ll.attach(mine, ll.TokenRowsConfig(token_ids=tuple(TOKENS)))
    randomise(mine, 0.1)
    config = peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny_models.build("llama", tie_word_embeddings=tie), config)
    layer = mine.model.embed_tokens
    rows = theirs.base_model.model.model.embed_tokens.trainable_tokens_delta["default"]
    with torch.no_grad():
        rows.copy_(layer.weight[TOKENS] + layer.lora_rows)  # PEFT stores the rows themselves
    ours, other = mine(input_ids=IDS, labels=IDS), theirs(input_ids=IDS, labels=IDS)
    with ll.active(mine, None):
        assert (mine(input_ids=IDS).logits - ours.logits).abs().max() > 1e-3
    torch.testing.assert_close(ours.logits, other.logits, atol=1e-5, rtol=1e-5)
    ours.loss.backward()
    other.loss.backward()
    assert layer.lora_rows.grad.abs().max() > 0
    torch.testing.assert_close(layer.lora_rows.grad, rows.grad, atol=1e-6, rtol=1e-4)
