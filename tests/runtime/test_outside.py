"""What other code does to an adapted model: casts, resized embeddings, save_pretrained, strict state dicts."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from safetensors import safe_open

import lora_lite as ll
import tiny_models
from lora_lite.testing.case import randomise

ROWS = tiny_models.build("llama").config.vocab_size
IDS = torch.arange(10).view(2, 5)
CFG = ll.LoRAConfig(r=3, alpha=7)


def adapted(cfg=CFG, **kwargs):
    model = tiny_models.build("llama")
    ll.attach(model, cfg, **kwargs)
    randomise(model, seed=1)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_cast_moves_base_and_adapter_together():
    model = adapted()
    want = logits(model)
    model.to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model).float(), want, atol=0.1, rtol=0.1)
    assert {p.dtype for p in ll.adapters(model)["default"].parameters()} == {torch.bfloat16}
    ll.adapters(model)["default"].restore_dtype()
    assert {p.dtype for p in ll.adapters(model)["default"].parameters()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


# ---- resize_token_embeddings


def test_resizing_leaves_adapters_elsewhere_alone():
    model = adapted()
    want = logits(model)
    model.resize_token_embeddings(70, mean_resizing=False)
    assert torch.equal(logits(model)[..., :ROWS], want) and logits(model).shape[-1] == 70


@pytest.mark.parametrize("rows", [70, 60])
@pytest.mark.parametrize(
    "cfg",
    [
        ll.LoRAConfig(r=3, target_kinds=("embedding",)),
        ll.LoRAConfig(r=3, train_modules=("lm_head",)),
        ll.BitFitConfig(target_names=("lm_head",)),
    ],
    ids=["embedding", "train_modules", "head"],
)
def test_resizing_under_an_adapter_is_named_with_the_cure(cfg, rows):
    model = adapted(cfg)
    before = model.lm_head.weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    with pytest.raises(ll.StateError, match=rf"has {rows} rows and had {before} .* Resize first, then attach"):
        logits(model)
    ll.detach(model)
    ll.attach(model, cfg)
    assert logits(model).shape[-1] == rows


def test_a_replaced_embedding_is_noticed():
    model = adapted(ll.LoRAConfig(r=3, target_kinds=("embedding",)))
    model.set_input_embeddings(torch.nn.Embedding(ROWS, 32))
    with pytest.raises(ll.StateError, match="resize_token_embeddings leaves an adapter's tensors behind"):
        logits(model)
    ll.detach(model)
    logits(model)


# ---- state dicts


def test_strict_load_of_a_base_says_how():
    base = tiny_models.build("llama").state_dict()
    model = adapted()
    want = {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}
    with pytest.raises(RuntimeError, match=r"28 of the 28 tensors of adapter 'default' .* before ll\.attach"):
        model.load_state_dict(base)
    model.load_state_dict(base, strict=False)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in want.items())


def test_strict_load_between_adapted_models_works():
    one, two = adapted(), adapted()
    randomise(two, seed=5)
    assert not torch.equal(logits(one), logits(two))
    assert not any(two.load_state_dict(one.state_dict()))
    assert torch.equal(logits(one), logits(two))
    ll.attach(two, CFG, name="second")
    with pytest.raises(RuntimeError, match="tensors of adapter 'second'"):
        two.load_state_dict(one.state_dict())


def test_hooks_are_gone_after_detach_and_follow_copies():
    model = tiny_models.build("llama")
    hooks = lambda m: (len(m._load_state_dict_pre_hooks), len(m._state_dict_hooks))  # noqa: E731
    before = hooks(model)
    ll.attach(model, CFG)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match="28 of the 28"):
            other.load_state_dict(tiny_models.build("llama").state_dict())
        ll.detach(other)
        assert hooks(other) == before
        other.load_state_dict(tiny_models.build("llama").state_dict())
    ll.detach(model)
    assert hooks(model) == before


# ---- save_pretrained


def keys(folder):
    with safe_open(folder / "model.safetensors", "pt") as f:
        return list(f.keys())


def test_save_pretrained_warns_and_loses_nothing(tmp_path):
    model = adapted()
    with pytest.warns(ll.LoraLiteWarning, match=r"reads the base alone.* ll\.merge\(model\) first"):
        model.save_pretrained(tmp_path)
    assert sum("lora_" in k for k in keys(tmp_path)) == 28
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.state_dict()


def test_save_pretrained_of_a_merged_model_is_a_plain_checkpoint(tmp_path):
    model = adapted()
    want = logits(model)
    ll.merge(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ll.LoraLiteWarning)
        model.save_pretrained(tmp_path)
    assert not any("lora_" in k for k in keys(tmp_path))
    plain = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(plain), want, atol=1e-5, rtol=1e-5)
    ll.unmerge(model)
    assert sum("lora_" in k for k in model.state_dict()) == 28
