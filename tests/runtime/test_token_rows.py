"""Trained token rows on whole models: tied and untied heads, files, merging, rows, and what is refused. And other
methods on tied weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import lora_lite as ll
import tiny_models
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import Snapshot

CFG = ll.TokenRowsConfig(token_ids=(5, 9, 63))
IDS = tiny_models.batch("llama", rows=4)["input_ids"].clone()
IDS[:, 2] = 5


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def llama(tie=True, *names, cfg=CFG):
    model = tiny_models.build("llama", tie_word_embeddings=tie)
    for i, name in enumerate(names or ("default",)):
        ll.attach(model, cfg, name=name)
        randomise(model, name, seed=i)
    return model


@pytest.mark.parametrize("tie", [True, False])
def test_from_plan_to_detach(tie, tmp_path):
    model = tiny_models.build("llama", tie_word_embeddings=tie)
    before, bare = Snapshot(model), logits(model)
    plan = ll.plan(model, CFG)
    assert [t.path for t in plan.targets] == ["model.embed_tokens"] + ["lm_head"] * tie
    assert plan.trainable == 3 * 32 and ("tied" in str(plan)) == tie
    assert not (d := before.difference(model)), d
    handle = ll.attach(model, CFG)
    assert torch.equal(logits(model), bare) and handle.num_parameters() == 96
    randomise(model)
    y = logits(model)
    changed = (y - bare).abs().amax((0, 1)) > 1e-4
    assert (IDS[0, :2] != 5).all() and torch.equal(
        y[:, :2, [0, 1]], bare[:, :2, [0, 1]]
    )  # before token 5, other logits
    assert bool((y - bare)[:, :2, [5, 9, 63]].any()) == tie and changed[[5, 9, 63]].all()
    E = model.model.embed_tokens.weight.detach().clone()
    E[[5, 9, 63]] += model.model.embed_tokens.lora_rows.detach()
    twin = tiny_models.build("llama", tie_word_embeddings=tie)
    twin.model.embed_tokens.weight.data.copy_(E)
    torch.testing.assert_close(logits(twin), y, atol=1e-5, rtol=1e-5)
    path = ll.save(model, tmp_path / "x")
    own = ll.adapter_state_dict(model)
    assert sorted(own) == ["model.embed_tokens.lora_ids", "model.embed_tokens.lora_rows"]
    report = ll.merge(model)
    assert report.n_layers == 1
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    ll.unmerge(model)
    assert torch.equal(logits(model), y)
    ll.rename(model, "default", "new")
    assert torch.equal(logits(model), y)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), y)
        randomise(twin, "new", seed=3)
        assert not torch.equal(logits(twin), y) and torch.equal(logits(model), y)
    ll.detach(model)
    assert not (d := before.difference(model)), d
    ll.load(model, path)
    assert torch.equal(logits(model), y)


def test_a_tied_file_on_a_model_whose_head_was_untied(tmp_path):
    model = llama()
    path = ll.save(model, tmp_path / "x")
    other = tiny_models.build("llama", tie_word_embeddings=True)
    other.lm_head.weight = nn.Parameter(other.lm_head.weight.detach().clone())
    ll.load(other, path)
    assert torch.equal(logits(other), logits(model))
    y = logits(other)
    assert ll.merge(other).n_layers == 2
    torch.testing.assert_close(logits(other), y, atol=1e-5, rtol=1e-5)


def test_training_and_its_gradients():
    """The gradient of the rows is that of the tied weight's rows; only the given tokens move."""
    model, dense = llama(), tiny_models.build("llama", tie_word_embeddings=True)
    dense.model.embed_tokens.weight.data[[5, 9, 63]] += model.model.embed_tokens.lora_rows.data
    for m in (model, dense):
        m(IDS, labels=IDS).loss.backward()
    rows = model.model.embed_tokens.lora_rows
    torch.testing.assert_close(rows.grad, dense.model.embed_tokens.weight.grad[[5, 9, 63]], atol=1e-6, rtol=1e-4)
    assert ll.check(model).learning == {"default": 1} and model.lm_head.weight.grad is None
    assert [p.shape for p in ll.adapters(model)["default"].parameters()] == [(3, 32)]


def test_several_and_rows():
    model = llama(True, "a", "b")
    alone = {}
    for choice in ("a", "b", None):
        with ll.active(model, choice):
            alone[choice] = logits(model)
    with ll.rows(model, ["b", None, "a", "b"]):
        mixed = logits(model)
    for i, name in enumerate(["b", None, "a", "b"]):
        torch.testing.assert_close(mixed[i], alone[name][i], atol=1e-5, rtol=1e-5)
    assert torch.equal(mixed[1], alone[None][1])
    ll.activate(model, {"a": 0.5, "b": -0.3})
    y = logits(model)
    ll.merge(model)
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-5)


def test_which_rows_by_default_and_which_embedding():
    model = llama(cfg=ll.TokenRowsConfig(r=4))
    assert model.model.embed_tokens.lora_ids.tolist() == [60, 61, 62, 63]
    plan = ll.plan(tiny_models.build("gpt2"), CFG)
    assert [t.path for t in plan.targets] == ["transformer.wte", "lm_head"]  # not the positions
    assert [t.path for t in ll.plan(tiny_models.build("bert"), CFG).targets] == ["bert.embeddings.word_embeddings"]
    two = nn.Sequential(nn.Embedding(70, 12), nn.Embedding(70, 12))
    with pytest.raises(ll.TargetError, match="2 embeddings.*target_names"):
        ll.attach(two, CFG)
    assert [t.path for t in ll.plan(two, ll.TokenRowsConfig(token_ids=(1,), target_names=("1",))).targets] == ["1"]


def test_what_is_refused(tmp_path):
    from lora_lite.testing.checks.suite import read_file, write_file

    model = tiny_models.build("llama", tie_word_embeddings=True)
    before = Snapshot(model)
    with pytest.raises(ll.ConfigError, match="model.embed_tokens: token_ids holds 64, and there are 64 rows"):
        ll.attach(model, ll.TokenRowsConfig(token_ids=(3, 64)))
    for ids in ((3, 3), (-1,)):
        with pytest.raises(ll.ConfigError, match="distinct and not negative"):
            ll.TokenRowsConfig(token_ids=ids)
    head, tensors = read_file(ll.save(llama(), tmp_path / "x"))
    for owner in ("nothing", "lm_head", 3, []):
        head["targets"]["lm_head"]["tied"] = owner
        with pytest.raises(ll.FileError, match="lm_head is tied to"):
            ll.load(model, write_file(tmp_path / "bad.safetensors", head, tensors))
    assert not (d := before.difference(model)), d
    mixed = llama()
    ll.attach(mixed, ll.LoRAConfig(r=2, target_names=("lm_head",)), name="lora")
    ll.activate(mixed, ["default", "lora"])
    with pytest.raises(ll.WeightError, match="tied"):
        ll.merge(mixed)


def test_other_methods_on_a_tied_embedding_say_what_they_change():
    """LoRA on the embedding of a tied model acts on the embedding alone: the plan says so, and merging refuses to
    change the head."""
    model = tiny_models.build("llama", tie_word_embeddings=True)
    cfg = ll.LoRAConfig(r=2, target_kinds=("embedding",))
    assert "model.embed_tokens shares its weight with 'lm_head', which stays as it is" in str(ll.plan(model, cfg))
    assert "shares" not in str(ll.plan(model, ll.LoRAConfig(r=2)))
    ll.attach(model, cfg)
    randomise(model)
    h = torch.randn(3, 32)
    assert torch.equal(model.lm_head(h), h @ model.lm_head.weight.T)
    before = Snapshot(model)
    with pytest.raises(ll.WeightError, match="tied to 'lm_head'.*tie_word_embeddings"):
        ll.merge(model)
    assert not (d := before.difference(model)), d


def test_one_graph():
    torch.compiler.reset()
    model = nn.Sequential(nn.Embedding(70, 12), nn.Linear(12, 70))
    model[1].weight = model[0].weight
    ll.attach(model, CFG)
    randomise(model)
    fast = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(fast(IDS), model(IDS))
    ll.activate(model, None)
    torch.testing.assert_close(fast(IDS), model(IDS))
    torch.compiler.reset()
