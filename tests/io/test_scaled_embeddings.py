"""Embeddings that multiply their rows with a number (Gemma, BART): changes of the weight pass through it."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

import peft
import torch
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

import lora_lite as ll
from peft_files import IDS, net


def scaled():
    model = net()
    emb = BartScaledWordEmbedding(31, 12, 0, embed_scale=3.5)
    emb.load_state_dict(model.emb.state_dict())
    model.emb = emb
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=3, lora_alpha=7, target_modules=["emb"]),
        peft.LoraConfig(r=3, lora_alpha=7, target_modules=["fc1"], trainable_token_indices={"emb": [5, 10, 3]}),
        peft.LoraConfig(r=3, lora_alpha=7, target_modules=["fc1"], modules_to_save=["emb"]),
    ],
    ids=["LoRA", "token rows", "whole"],
)
def test_both_ways(config, tmp_path):
    bare = scaled()(IDS)
    theirs = peft.get_peft_model(scaled(), config)
    for name, p in theirs.named_parameters():
        if p.requires_grad and "emb" in name:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(1))
    want = theirs.eval()(input_ids=IDS)
    theirs.save_pretrained(tmp_path / "a")
    model = scaled()
    ll.load(model, tmp_path / "a")
    assert (want - bare).abs().max() > 0.05
    assert (model(IDS) - want).abs().max() < 1e-5
    ll.export(model, tmp_path / "b")
    again = peft.PeftModel.from_pretrained(scaled(), tmp_path / "b").eval()
    assert (again(input_ids=IDS) - want).abs().max() < 1e-5
