"""Prefixes and virtual tokens in a real model: cached generation, padding, beams, rows, checkpointing, detaching."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import lora_lite as ll
import tiny_llm
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import Snapshot

CONFIGS = [
    ll.PrefixTuningConfig(r=3),
    ll.PromptTuningConfig(r=3),
    ll.AdaptionPromptConfig(r=3),
]
BEFORE = CONFIGS[:2]


def by_name(configs):
    return pytest.mark.parametrize("cfg", configs, ids=[c.variant for c in configs])


def llama(implementation="sdpa", **changes):
    model = tiny_llm.model().eval()
    model.set_attn_implementation(implementation)
    return model


def adapted(*configs, implementation="sdpa"):
    model = llama(implementation)
    for name, cfg in zip("abc", configs, strict=False):
        ll.attach(model, cfg, name=name)
        randomise(model, name, seed=ord(name), scale=0.5)
    return model


def tokens(*shape, seed=0):
    return torch.randint(4, 80, shape, generator=torch.Generator().manual_seed(seed))


def greedy(model, prompt, steps, mask=None):
    """The uncached forward, token by token, with the positions that generate counts."""
    seq, mask = prompt, torch.ones_like(prompt) if mask is None else mask
    for _ in range(steps):
        at = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        logits = model(input_ids=seq, attention_mask=mask, position_ids=at, use_cache=False).logits
        seq = torch.cat((seq, logits[:, -1].argmax(-1, keepdim=True)), 1)
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
    return seq


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@by_name(CONFIGS)
@torch.no_grad()
def test_cached_generation_is_the_uncached_forward(cfg, implementation):
    model, prompt = adapted(cfg, implementation=implementation), tokens(3, 5)
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0  # padded on the left
    got = model.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(got, greedy(model, prompt, 6, mask))
    with ll.active(model, None):
        bare = model.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert not torch.equal(got, bare)


@by_name(CONFIGS)
@torch.no_grad()
def test_padding_changes_nothing(cfg):
    model, prompt = adapted(cfg), tokens(1, 6)
    want = model(prompt).logits
    right = torch.cat((prompt, tokens(1, 2, seed=4)), 1)
    mask = torch.tensor([[1] * 6 + [0] * 2])
    torch.testing.assert_close(model(right, attention_mask=mask).logits[:, :6], want, atol=1e-5, rtol=1e-5)
    left, at = right.roll(2, 1), torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5]])
    got = model(left, attention_mask=mask.roll(2, 1), position_ids=at).logits[:, 2:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@by_name(CONFIGS)
@torch.no_grad()
def test_rows_and_beams_generate_as_each_adapter_alone(cfg):
    model = adapted(cfg, type(cfg)(r=5), ll.LoRAConfig(r=4, alpha=3))
    prompt, names = tokens(4, 5), ["b", None, "c", "a"]
    how = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "eos_token_id": None}
    with ll.rows(model, names):
        mixed = model.generate(prompt, **how)
        logits = model(prompt).logits
    for i, name in enumerate(names):
        with ll.active(model, name):
            assert torch.equal(mixed[i : i + 1], model.generate(prompt[i : i + 1], **how)), name
            alone = model(prompt).logits[i]
            assert torch.equal(logits[i], alone) if name is None else (logits[i] - alone).abs().max() < 1e-5


@by_name(CONFIGS)
def test_two_act_together_and_by_weight(cfg):
    """Weight 1 of both is the longer prefix; a half is half of the change at each attention."""
    model = adapted(cfg, type(cfg)(r=5))
    x = tokens(2, 6)
    found = {}
    for choice in ("a", None, ("a", "b")):
        with ll.active(model, choice):
            found[choice] = model(x).logits
    for choice, name in (({"a": 1.0, "b": 0.0}, "a"), ({"a": 0.0}, None)):
        with ll.active(model, choice):
            torch.testing.assert_close(model(x).logits, found[name], atol=1e-5, rtol=1e-5)
    with ll.active(model, {"a": 0.5}):
        half = model(x).logits
    assert all((half - found[name]).abs().max() > 1e-3 for name in ("a", None))
    assert (found["a", "b"] - found["a"]).abs().max() > 1e-3


@by_name(CONFIGS)
def test_gradients_under_checkpointing(cfg):
    grads = []
    for checkpointing in (False, True):
        model = adapted(cfg).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        x = tokens(2, 6)
        model(input_ids=x, labels=x).loss.backward()
        grads.append([p.grad for p in ll.adapters(model)["a"].parameters()])
        assert all(g is not None and g.abs().max() > 0 for g in grads[-1])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


def test_virtual_tokens_refuse_a_reentrant_checkpoint():
    model = adapted(ll.PromptTuningConfig(r=3)).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    x = tokens(2, 6)
    with pytest.raises(ll.SelectionError, match="use_reentrant=False"):
        model(input_ids=x, labels=x)


@by_name(CONFIGS)
def test_detach_gives_the_model_back(cfg):
    model, x = llama(), tokens(2, 5)
    before = Snapshot(model, x)
    ll.attach(model, cfg)
    randomise(model)
    assert not torch.equal(model(x).logits, before.output[0])
    ll.detach(model)
    assert not (d := before.difference(model)), d
    assert not hasattr(type(model.model.layers[0].self_attn.config), "attend")


@by_name(CONFIGS)
@torch.no_grad()
def test_copies_files_and_bf16(cfg, tmp_path):
    model, x = adapted(cfg), tokens(2, 5)
    want = model(x).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x).logits, want)
    path = ll.save(model, tmp_path / "a", name="a")
    fresh = llama()
    ll.load(fresh, path)
    assert torch.equal(fresh(x).logits, want)
    low = model.to(torch.bfloat16)
    assert low(x).logits.dtype == torch.bfloat16 and (low(x).logits.float() - want).abs().max() < 0.2


@by_name(BEFORE)
@torch.no_grad()
def test_the_text_stands_behind_it(cfg):
    """In a model without an adapter: the same keys and values in the cache, and positions that begin after them."""
    from transformers import DynamicCache

    model, x = adapted(cfg), tokens(2, 5)
    got = model(x).logits
    cache = DynamicCache()
    if cfg.variant == "prefix_tuning":
        for i, layer in enumerate(model.model.layers):
            K, V = (
                t.view(3, 2, 8).transpose(0, 1)[None].expand(2, -1, -1, -1)
                for t in (getattr(layer.self_attn, "lora_K@a"), getattr(layer.self_attn, "lora_V@a"))
            )
            cache.update(K, V, i)
    ll_P = next((p for n, p in model.named_parameters() if "lora_P" in n), None)
    with ll.active(model, None):
        if ll_P is not None:
            whole = torch.cat((ll_P.expand(2, -1, -1), model.model.embed_tokens(x)), 1)
            want = model(inputs_embeds=whole).logits[:, 3:]
        else:
            want = model(x, past_key_values=cache).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_prefix_that_starts_as_text_is_that_text():
    """Behind the keys and values of a text the model goes on as after the text itself."""
    model, text, x = llama(), tokens(1, 4, seed=3), tokens(2, 5)
    with torch.no_grad():
        want = model(torch.cat((text.expand(2, -1), x), 1)).logits[:, 4:]
        ll.attach(model, ll.PrefixTuningConfig(r=4), [{"input_ids": text}])
        torch.testing.assert_close(model(x).logits, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ll.ConfigError, match="has 4 tokens.*r=4"):
        ll.attach(llama(), ll.PrefixTuningConfig(r=9), [{"input_ids": text}])


def test_a_prompt_that_starts_as_words_is_those_words():
    model, x = llama(), tokens(2, 5)
    with torch.no_grad():
        want = model(torch.cat((torch.tensor([[7, 9, 7]]).expand(2, -1), x), 1)).logits[:, 3:]
        ll.attach(model, ll.PromptTuningConfig(r=3, start_tokens=(7, 9)))
        torch.testing.assert_close(model(x).logits, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ll.ConfigError, match="vocabulary"):
        ll.attach(llama(), ll.PromptTuningConfig(start_tokens=(10_000,)))


def test_what_cannot_stand_before_a_text_is_said():
    with pytest.raises(ll.TargetError, match="flex_attention.*set_attn_implementation"):
        ll.attach(llama("flex_attention"), ll.PrefixTuningConfig(r=3))
    with pytest.raises(ll.TargetError, match="stands on attention.*ALL_ATTENTION_FUNCTIONS"):
        ll.attach(torch.nn.Sequential(torch.nn.Linear(3, 3)), ll.PrefixTuningConfig(r=3))
    model = adapted(ll.PrefixTuningConfig(r=3))
    with pytest.raises(ll.SelectionError, match="whole model"):
        model.model(tokens(1, 4))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ll.SelectionError, match="set_attn_implementation"):
        model(tokens(1, 4))
    with pytest.raises(ll.StateError, match="not an affine"):
        ll.merge(model)


@torch.no_grad()
def test_virtual_tokens_see_the_other_active_adapters():
    """A LoRA beside the prompt acts on the prompt's own keys and values, as if it stood in the sequence."""
    model, x = adapted(ll.PromptTuningConfig(r=3), ll.LoRAConfig(r=4, alpha=3)), tokens(2, 5)
    P = next(p for n, p in model.named_parameters() if "lora_P" in n)
    with ll.active(model, ["a", "b"]):
        got = model(x).logits
    with ll.active(model, "b"):
        whole = torch.cat((P.expand(2, -1, -1), model.model.embed_tokens(x)), 1)
        torch.testing.assert_close(got, model(inputs_embeds=whole).logits[:, 3:], atol=1e-5, rtol=1e-5)


def test_an_encoder_takes_prefixes_and_refuses_virtual_tokens():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 20, "num_hidden_layers": 2}
    model = BertModel(BertConfig(vocab_size=90, **sizes)).eval()
    x = tokens(2, 5)
    before = model(x).last_hidden_state
    ll.attach(model, ll.PrefixTuningConfig(r=3))
    assert (model(x).last_hidden_state - before).abs().max() > 1e-2
    with pytest.raises(ll.TargetError, match="causal decoder"):
        ll.attach(model, ll.PromptTuningConfig(r=3), name="b")


def test_gpt2_with_absolute_positions():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=16, n_head=2, n_layer=2, n_positions=64)).eval()
    ll.attach(model, ll.PromptTuningConfig(r=3))
    randomise(model, scale=0.5)
    P = next(p for n, p in model.named_parameters() if "lora_P" in n)
    x = tokens(2, 5)
    with torch.no_grad():
        got = model.generate(x, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert torch.equal(got, greedy(model, x, 4))
        mine = model(x).logits
        with ll.active(model, None):
            whole = torch.cat((P.expand(2, -1, -1), model.transformer.wte(x)), 1)
            torch.testing.assert_close(mine, model(inputs_embeds=whole).logits[:, 3:], atol=1e-5, rtol=1e-5)
    ll.attach(model, ll.AdaptionPromptConfig(r=3), name="gate")
    randomise(model, "gate")
    assert (model(x).logits - mine).abs().max() > 1e-3
