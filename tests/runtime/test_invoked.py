"""aLoRA, and positions that begin at the last occurrence of some tokens."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import lora_lite as ll
import tiny_models
from lora_lite.testing.case import randomise
from neighbours import needs
from tiny_blocks import decoder, padded, prompts

CALL = (38, 39)
"""The invocation; no prompt of `prompts` has these two tokens in this order unless it is put there."""


def row(n, *at, seed=0):
    """n tokens with the invocation at these places."""
    ids = prompts((n,), seed)[0].clamp_max(37)
    for i in at:
        ids[i : i + 2] = torch.tensor(CALL)
    return ids


def adapted(positions="from:38,39", **fields):
    model = decoder()
    ll.attach(model, ll.ALoRAConfig(r=3, alpha=7, positions=positions, **fields))
    randomise(model)
    return model


def twin(model):
    """The same adapter as LoRA, on all tokens."""
    other = decoder()
    ll.attach(other, ll.LoRAConfig(r=3, alpha=7))
    ll.load_adapter_state_dict(other, None, ll.adapter_state_dict(model))
    return other


def logits(model, **batch):
    with torch.no_grad():
        return model(**batch).logits


def test_from_the_last_occurrence_on():
    """Base before it, LoRA from it on: with the base's keys and values in the cache."""
    model = adapted()
    ids = row(9, 1, 5)[None]
    got, plain = logits(model, input_ids=ids), twin(model)
    with ll.active(model, None):
        bare = logits(model, input_ids=ids)
        before = model(input_ids=ids[:, :5], use_cache=True)
    assert torch.equal(got[:, :5], bare[:, :5])
    want = logits(plain, input_ids=ids[:, 5:], **tiny_models.continuing(plain, before.past_key_values))
    torch.testing.assert_close(got[:, 5:], want, atol=1e-5, rtol=1e-5)
    assert (got[:, 5:] - bare[:, 5:]).abs().max() > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_padding_and_rows_without_an_invocation(side):
    model, rows = adapted(), [row(9, 5), row(4, seed=1), row(6, 0, 3, seed=2)]
    got = logits(model, **padded(rows, side))
    for i, ids in enumerate(rows):
        at = slice(9 - len(ids), 9) if side == "left" else slice(0, len(ids))
        torch.testing.assert_close(got[i, at], logits(model, input_ids=ids[None])[0], atol=1e-5, rtol=1e-5)
    with ll.active(model, None):
        torch.testing.assert_close(
            logits(model, input_ids=rows[1][None])[0],
            got[1, 5:] if side == "left" else got[1, :4],
            atol=1e-5,
            rtol=1e-5,
        )


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_and_without_a_cache(beams):
    model = adapted()
    batch = padded([row(9, 5), row(4, seed=1), row(6, 3, seed=2)])
    batch.pop("position_ids")
    fields = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    with torch.no_grad():
        cached = model.generate(**batch, use_cache=True, **fields)
        whole = model.generate(**batch, use_cache=False, **fields)
    assert torch.equal(cached, whole)
    with ll.active(model, None), torch.no_grad():
        assert not torch.equal(cached, model.generate(**batch, use_cache=True, **fields))


def test_a_cache_filled_in_pieces():
    model, ids = adapted(), row(9, 4)[None]
    want, cache, got = logits(model, input_ids=ids), None, []
    for piece in (ids[:, :3], ids[:, 3:7], ids[:, 7:]):
        with torch.no_grad():
            out = model(input_ids=piece, **tiny_models.continuing(model, cache), use_cache=True)
        cache = out.past_key_values
        got.append(out.logits)
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-5, rtol=1e-5)


def test_an_invocation_that_a_cache_cuts_in_two():
    """The rest of it counts, and what follows."""
    model, ids = adapted(), row(9, 4)[None]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        keys = [copy.deepcopy(cache) for _ in range(2)]
        got = model(input_ids=ids[:, 5:], **tiny_models.continuing(model, cache)).logits
        with ll.active(model, None):
            bare = model(input_ids=ids[:, 5:], **tiny_models.continuing(model, keys[0])).logits
        want = twin(model)(input_ids=ids[:, 5:], **tiny_models.continuing(model, keys[1])).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert (got - bare).abs().max() > 1e-2


def test_a_cache_of_the_base_is_continued():
    """The point of the method: the prompt's keys and values need not be computed again."""
    model, ids = adapted(), row(9, 5)[None]
    with torch.no_grad():
        with ll.active(model, None):
            cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        other = copy.deepcopy(cache)
        got = model(input_ids=ids[:, 5:], **tiny_models.continuing(model, cache)).logits
        torch.testing.assert_close(got, logits(model, input_ids=ids)[:, 5:], atol=1e-5, rtol=1e-5)
        last = ids[:, 4:5]  # no invocation, and none can be known of
        with pytest.raises(ll.SelectionError, match="no earlier call was seen"):
            model(input_ids=last, **tiny_models.continuing(model, other))
        model(input_ids=row(5, 2)[None], use_cache=True)  # of another cache
        with pytest.raises(ll.SelectionError, match="no earlier call was seen"):
            model(input_ids=last, **tiny_models.continuing(model, other))


def test_what_cannot_be_told_raises():
    model = adapted()
    with pytest.raises(ll.SelectionError, match="input_ids"):
        model(inputs_embeds=torch.randn(1, 4, 16))
    for wrong in ("from:", "from:a", "from:3,,4", "from"):
        with pytest.raises(ll.ConfigError, match="from:5,17"):
            ll.ALoRAConfig(positions=wrong)
    with pytest.raises(ll.StateError, match="not an affine function"):
        ll.merge(model)


def test_batches_of_several_adapters():
    model = adapted()
    ll.attach(model, ll.LoRAConfig(r=2, alpha=5, seed=3), name="plain")
    randomise(model, "plain", seed=4)
    ids = torch.stack([row(8, 4), row(8, 2, seed=1), row(8, 1, seed=2)])
    with ll.rows(model, ["default", "plain", None]):
        got = logits(model, input_ids=ids)
    for i, name in enumerate(("default", "plain", None)):
        with ll.active(model, name):
            torch.testing.assert_close(got[i], logits(model, input_ids=ids[i : i + 1])[0], atol=1e-5, rtol=1e-5)


def test_other_methods_take_these_positions():
    model = decoder()
    ll.attach(model, ll.DiReFTConfig(r=2, positions="from:38,39"))
    randomise(model)
    ids = row(9, 5)[None]
    got = logits(model, input_ids=ids)
    with ll.active(model, None):
        bare = logits(model, input_ids=ids)
    assert torch.equal(got[:, :5], bare[:, :5]) and (got[:, 5:] - bare[:, 5:]).abs().max() > 1e-3


@needs("peft", "0.18", "aLoRA")
def test_parity():
    """PEFT's, with the same tensors: logits and gradients."""
    model, ids = adapted(target_names=("q_proj", "down_proj")), torch.stack([row(9, 1, 5), row(9, seed=1), row(9, 0)])
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["q_proj", "down_proj"],
        task_type="CAUSAL_LM",
        alora_invocation_tokens=list(CALL),
    )
    theirs = peft.get_peft_model(decoder(), config).train()
    pairs = []
    for path in ll.adapters(model)["default"].targets:
        mine, layer = model.get_submodule(path), theirs.base_model.model.get_submodule(path)
        for k in "AB":
            tensor = getattr(layer, f"lora_{k}")["default"].weight
            tensor.data.copy_(getattr(mine, f"lora_{k}").detach())
            pairs.append((getattr(mine, f"lora_{k}"), tensor))
    y, z = model(input_ids=ids).logits, theirs(input_ids=ids).logits
    torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-5)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad((y * weights).sum(), [a for a, _ in pairs])
    want = torch.autograd.grad((z * weights).sum(), [b for _, b in pairs])
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
