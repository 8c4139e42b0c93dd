"""Methods that are fitted from contrast pairs, on decoders: the fit, the strength at run time, files, and company."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from tiny_blocks import decoder, outputs, padded, prompts, randomise

FITTED = (
    ll.CAAConfig(),
    ll.PCASteeringConfig(),
    ll.AblationConfig(),
    ll.SSteerConfig(r=4, target_roles=None, exclude_names=("self_attn.*",)),
)
IDS = [cfg.variant for cfg in FITTED]


def pairs(side="left", rows=3):
    """Three pairs of padded batches."""
    out = []
    for k in range(3):
        lengths = tuple(range(3 + k, 3 + k + rows))
        both = (padded(prompts(lengths, seed=10 * k + j), side) for j in (1, 2))
        out.append(tuple({key: b[key] for key in ("input_ids", "attention_mask", "position_ids")} for b in both))
    return out


def tensors(model, name=None):
    return ll.adapter_state_dict(model, name)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("cfg", FITTED[:3], ids=IDS[:3])
def test_padding_does_not_count(kind, cfg):
    found = []
    for side in ("left", "right"):
        model = decoder(kind)
        ll.attach(model, cfg, pairs(side))
        found.append(tensors(model))
    one_by_one = [
        ({"input_ids": a["input_ids"][i : i + 1, -n:]}, {"input_ids": b["input_ids"][i : i + 1, -n:]})
        for a, b in pairs()
        for i, n in enumerate(a["attention_mask"].sum(1).tolist())
    ]
    model = decoder(kind)
    ll.attach(model, cfg, one_by_one)
    found.append(tensors(model))
    for other in found[1:]:
        for key, value in found[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-4)


def test_the_vector_is_the_difference_of_last_tokens():
    model, sides = decoder(), ([], [])
    with outputs(model, 1) as seen, torch.no_grad():
        for pair in pairs():
            for side, batch in zip(sides, pair, strict=True):
                model(**batch)
                side.append(seen.pop()[:, -1])  # left-padded
    v = torch.cat(sides[0]).mean(0) - torch.cat(sides[1]).mean(0)
    ll.attach(model, ll.CAAConfig(layers=(1,)), pairs())
    block = model.model.layers[1]
    torch.testing.assert_close(block.lora_norm * block.lora_v, v, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cfg", FITTED, ids=IDS)
def test_strength_is_the_weight(cfg, dtype):
    """Weight 0 gives the base's bits; otherwise the effect on one layer is linear in weight and strength."""
    model, batch = decoder().to(dtype), padded(prompts((6, 3)))
    ll.attach(model, cfg, pairs())
    with torch.no_grad():
        with ll.active(model, None):
            base = model(**batch).logits
        with ll.active(model, {"default": 0.0}):
            assert torch.equal(model(**batch).logits, base)
        full = model(**batch).logits
        assert not torch.equal(full, base)
    if dtype != torch.float32:
        return
    fields = {"layers": (1,)} | ({"target_names": ("down_proj",)} if cfg.variant == "s_steer" else {})
    changes = {}
    for strength, weight in ((1.0, 1.0), (1.0, -2.5), (2.0, 1.0)):
        model = decoder()
        one = type(cfg)(**{**cfg.to_dict(), **fields, "exclude_names": (), "strength": strength})
        ll.attach(model, one, pairs())
        with outputs(model, 1) as seen, torch.no_grad():
            for choice in ({"default": weight}, None):
                with ll.active(model, choice):
                    model(**batch)
        changes[strength, weight] = seen[0] - seen[1]
    torch.testing.assert_close(changes[1.0, -2.5], -2.5 * changes[1.0, 1.0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(changes[2.0, 1.0], 2 * changes[1.0, 1.0], rtol=1e-4, atol=1e-5)
    assert changes[1.0, 1.0].abs().max() > 1e-2


@pytest.mark.parametrize("cfg", FITTED, ids=IDS)
def test_loading_needs_no_data(cfg, tmp_path):
    model, batch = decoder(), padded(prompts((6, 3)))
    handle = ll.attach(model, cfg, pairs(), name="mood")
    assert not list(handle.parameters()) and not any(p.requires_grad for p in model.parameters())
    path = ll.save(model, tmp_path / "mood.safetensors")
    fresh = decoder()
    ll.load(fresh, path, name="other")
    assert tensors(fresh).keys() == tensors(model).keys()
    with torch.no_grad():
        assert torch.equal(fresh(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generated_tokens_only(kind):
    """The prompt stays untouched, the cache changes nothing, and neither do beams that repeat rows."""
    model, lengths = decoder(kind), (6, 3)
    ll.attach(model, ll.CAAConfig(positions="generated", strength=8.0, layers=(1,)), pairs())
    batch = padded(prompts(lengths))
    with torch.no_grad():
        steered = model(**batch).logits
        with ll.active(model, None):
            assert torch.equal(model(**batch).logits, steered)
    del batch["position_ids"]
    for beams in (1, 2):
        options = {**batch, "max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
        cached = model.generate(**options)
        with ll.active(model, None):
            bare = model.generate(**options)
        assert torch.equal(cached[:, :7], bare[:, :7]) or beams > 1
        assert not torch.equal(cached, bare)
        with ll.prompt(model, lengths):
            assert torch.equal(model.generate(**options, use_cache=False), cached)


def test_in_rows_and_beside_a_lora():
    model = decoder()
    ll.attach(model, ll.LoRAConfig(r=2), name="lora")
    randomise(model, "lora")
    alone = decoder()
    ll.attach(alone, ll.CAAConfig(), pairs())
    ll.attach(model, ll.CAAConfig(), pairs(), name="mood")  # fitted on the bare model, not on the LoRA
    for key, value in tensors(alone).items():
        assert torch.equal(tensors(model, "mood")[key], value)
    batch = padded(prompts((6, 3, 5)))
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        with ll.rows(model, ["mood", None, "lora"]):
            mixed = model(**batch).logits
        for i, name in enumerate(("mood", None, "lora")):
            with ll.active(model, name):
                torch.testing.assert_close(mixed[i][real[i]], model(**batch).logits[i][real[i]], rtol=1e-4, atol=1e-5)
        with ll.active(model, {"mood": 0.5, "lora": 1.0}):
            both = model(**batch).logits
        with ll.active(model, "lora"):
            assert not torch.equal(model(**batch).logits, both)


def test_training_a_lora_under_a_steering_vector():
    model, batch = decoder(), padded(prompts((6, 5)))
    ll.attach(model, ll.CAAConfig(), pairs(), name="mood")
    handle = ll.attach(model, ll.LoRAConfig(r=2), name="lora")
    ll.activate(model, ["mood", "lora"])
    before = {k: v.clone() for k, v in tensors(model, "mood").items()}
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.01)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in tensors(model, "mood").items())
    assert any(p.abs().max() > 0 for n, p in handle.named_parameters() if n.endswith("lora_B"))


@pytest.mark.parametrize("cfg", FITTED, ids=IDS)
def test_wrong_data_raises_and_leaves_the_model_alone(cfg):
    model, good = decoder(), pairs()
    a, b = good[0]
    empty_row = {**a, "attention_mask": a["attention_mask"] * torch.tensor([[1], [0], [1]])}
    for data, words in (
        ({"positive": [a], "negative": [b]}, "list of pairs"),
        ([a, b], "instead of a pair"),
        ([(a, b, a)], "instead of a pair"),
        ([(a, {k: v[:2] for k, v in b.items()})], "3 and 2 rows"),
        ([], "empty"),
        ([(empty_row, b)], "nothing but padding"),
    ):
        with pytest.raises(ll.ConfigError, match=words):
            ll.attach(model, cfg, data)
    with pytest.raises(ll.ConfigError, match="do not differ there.*token='mean'"):
        ll.attach(model, cfg, [(a, a)])
    with pytest.raises(ll.ConfigError, match="calibration_data"):
        ll.attach(model, cfg)
    assert not ll.adapters(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    ll.attach(model, cfg, good)
