"""B8. Tied weights: what acts on one end leaves the other alone, or says so; merged and saved, the model is itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
import tiny_models
from lora_lite.testing.case import randomise
from methods import every_method


class Tied(nn.Module):
    """Embedding and head share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 12)
        self.mid = nn.Linear(12, 12)
        self.head = nn.Linear(12, 17, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mid(self.embed(ids)).tanh())

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head


IDS = torch.tensor([[3, 5, 7], [2, 2, 16]])


@every_method(lambda case: case.linear and case.affine and not case.variant.needs_data)
def test_the_head_alone(case):
    """Adapted, the embedding gives its bits; merging refuses, or unties, and never touches the embedding."""
    torch.manual_seed(0)
    model = Tied().eval()
    rows, weight = model.embed(IDS).clone(), model.embed.weight.clone()
    cfg = case.cfg(target_names=None)
    changes = {"r": cfg.r, "alpha": cfg.alpha, "target_names": ("head",), "target_kinds": ("linear",)}
    try:
        ll.attach(model, case.sized(**changes))
    except ll.LoraLiteError as e:
        assert "head" in str(e)
        return
    randomise(model)
    want = model(IDS).detach()
    assert torch.equal(model.embed(IDS), rows)
    try:
        ll.merge(model)
    except ll.WeightError as e:
        assert "tied" in str(e) or "share" in str(e)
        assert torch.equal(model.embed.weight, weight) and torch.equal(model(IDS), want)
    else:
        assert torch.equal(model.embed(IDS), rows)
        torch.testing.assert_close(model(IDS), want, atol=1e-5, rtol=1e-5)
        ll.unmerge(model)
    ll.detach(model)
    assert model.head.weight is model.embed.weight and torch.equal(model.embed.weight, weight)


def test_the_plan_says_that_a_weight_is_shared():
    text = str(ll.plan(Tied(), ll.LoRAConfig(target_names=("head",))))
    assert "embed" in text and "share" in text


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_a_merged_language_model_is_saved_as_what_it_is(tie, tmp_path):
    """transformers' own save and load of a merged model."""
    model = tiny_models.build("llama", tie_word_embeddings=tie)
    ll.attach(model, ll.LoRAConfig(r=3, alpha=7))
    randomise(model)
    batch = tiny_models.batch("llama")
    want = model(**batch).logits
    ll.merge(model)
    merged = model(**batch).logits
    torch.testing.assert_close(merged, want, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, merged)
    assert not torch.allclose(merged, tiny_models.build("llama", tie_word_embeddings=tie)(**batch).logits, atol=1e-3)
