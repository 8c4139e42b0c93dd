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


# ---- written by others


class Pipeline(torch.nn.Module):
    """Holds a transformer that it saves on its own, as sentence-transformers does."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_models.build("llama")

    def forward(self, input_ids):
        return self.inner(input_ids=input_ids).logits

    def save(self, folder):
        self.inner.save_pretrained(folder)


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_inside_is_not_saved_without_a_word(tmp_path, inside):
    model = Pipeline()
    before = [len(m._state_dict_hooks) for m in model.modules()]
    home = model.inner if inside else model
    ll.attach(home, CFG)
    randomise(home, seed=1)
    with pytest.warns(ll.LoraLiteWarning, match="save_pretrained") as caught:
        model.save(tmp_path / "all")
    assert len(caught) == 1
    want = model.eval()(IDS)
    ll.merge(home)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save(tmp_path / "merged")
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as f:
        assert not [k for k in f.keys() if "lora" in k]  # noqa: SIM118 -- it has no other listing
    bare = type(model.inner).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(bare.eval()(input_ids=IDS).logits, want, atol=1e-5, rtol=0)
    ll.unmerge(home)
    ll.detach(home)
    assert [len(m._state_dict_hooks) for m in model.modules()] == before


def test_accelerate_save_model_does_not_mix_in_silence(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator, model = accelerate.Accelerator(cpu=True), adapted()
    with pytest.warns(ll.LoraLiteWarning, match="save_model"):
        accelerator.save_model(model, tmp_path / "all")
    want = logits(model)
    ll.merge(model)
    accelerator.save_model(model, tmp_path / "merged")
    bare = tiny_models.build("llama")
    accelerate.load_checkpoint_in_model(bare, str(tmp_path / "merged"))
    torch.testing.assert_close(logits(bare.eval()), want, atol=1e-5, rtol=0)


# ---- PEFT was here before


@pytest.mark.parametrize("how", ["wrapped", "injected", "prompt"])
def test_a_model_of_pefts_is_refused_with_the_cure(how):
    peft = pytest.importorskip("peft")
    model = tiny_models.build("llama")
    lora = peft.LoraConfig(r=3, target_modules=["q_proj"])
    if how == "injected":
        try:
            model.add_adapter(lora)
        except ValueError as e:  # transformers 5.24 wants a peft that is not out yet
            pytest.skip(str(e))
    else:
        prompt = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = peft.get_peft_model(model, lora if how == "wrapped" else prompt)
    keys = list(model.state_dict())
    with pytest.raises(ll.StateError, match="unload" if how != "injected" else "load the base without"):
        ll.attach(model, CFG)
    assert list(model.state_dict()) == keys
    if how == "wrapped":
        assert len(ll.attach(model.unload(), CFG).targets) == 14


# ---- a head that somebody multiplies with himself


class Fused(torch.nn.Module):
    """A language model whose training call reads the head's weight, as fused cross-entropies do."""

    def __init__(self, fused):
        super().__init__()
        self.body, self.head, self.fused = torch.nn.Embedding(20, 12), torch.nn.Linear(12, 20, bias=False), fused

    def get_output_embeddings(self):
        return self.head

    def get_input_embeddings(self):
        return self.body

    def forward(self, x):
        h = self.body(x)
        return h @ self.head.weight.mT if self.fused and torch.is_grad_enabled() else self.head(h)


HEADS = [
    ll.LoRAConfig(r=3, alpha=7, target_names=("head",)),
    ll.LoRAConfig(r=3, alpha=7, target_kinds=("embedding",), train_modules=("head",)),
    ll.TokenRowsConfig(token_ids=(3, 4)),
]


@pytest.mark.parametrize("cfg", HEADS, ids=["lora", "whole", "tied-rows"])
def test_a_fused_head_is_not_adapted_in_silence(cfg):
    for fused in (False, True):
        model = Fused(fused)
        if isinstance(cfg, ll.TokenRowsConfig):
            model.head.weight = model.body.weight
        ll.attach(model, cfg)
        x = torch.arange(6).view(2, 3)
        if not fused:
            model.train()(x).sum().backward()
            continue
        with torch.no_grad():
            model.train()(x)
        with pytest.raises(ll.StateError, match="'head'.*fused head"):
            model(x)
        with ll.active(model, None):
            model(x)
        model.eval()(x)
