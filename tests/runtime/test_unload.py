"""`ll.merge_and_unload`: the merged weights stay, everything of ours goes."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import Snapshot, toy
from tiny_models import batch, build

X = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=3, alpha=7), ll.DoRAConfig(r=3, alpha=7), ll.IA3Config()])
def test_a_plain_model_that_gives_the_same(name, cfg):
    model, data = build(name).double().eval(), batch(name)
    keys, trainable = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    bare = model(**data).logits.detach()
    ll.attach(model, cfg)
    randomise(model)
    ll.attach(model, ll.HRAConfig(r=2), name="idle")
    ll.activate(model, "default")
    want = model(**data).logits
    assert ll.merge_and_unload(model) is model
    torch.testing.assert_close(model(**data).logits, want, rtol=0, atol=1e-6)
    assert (want - bare).abs().max() > 1e-3
    assert list(model.state_dict()) == keys and [p.requires_grad for p in model.parameters()] == trainable
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and ll.adapters(model) == {}
    merged = model(**data).logits.detach()
    ll.attach(model, ll.LoRAConfig(r=2))  # the next one stands on the merged weights
    assert torch.equal(model(**data).logits, merged)


def test_what_is_merged_already():
    model = toy()
    ll.attach(model, ll.LoRAConfig(r=3, alpha=7))
    randomise(model)
    ll.merge(model)
    want = model(X).detach()
    ll.merge_and_unload(model)
    assert torch.equal(model(X), want) and not any("lora_" in k for k in model.state_dict())


@pytest.mark.parametrize("already", [False, True])
def test_all_or_nothing(already, monkeypatch):
    model = toy()
    ll.attach(model, ll.LoRAConfig(r=3, alpha=7))
    randomise(model)
    if already:
        ll.merge(model)
    before, want = Snapshot(model), model(X).detach()

    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_lite.runtime.commit._remove_root_hooks", lambda m: stop())
    with pytest.raises(KeyboardInterrupt):
        ll.merge_and_unload(model)
    monkeypatch.undo()
    assert not before.difference(model) and torch.equal(model(X), want)
    if already:
        ll.unmerge(model)
    assert list(ll.adapters(model)) == ["default"]


def test_nothing_to_merge():
    with pytest.raises(ll.StateError, match="no adapter"):
        ll.merge_and_unload(toy())
