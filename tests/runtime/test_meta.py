"""Attaching to a model without weights: works for every method whose start does not depend on them, and is refused by
name for the others."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
import tiny_models
from neighbours import autocast_on_meta

METHODS = [v.name for v in ll.variants() if not v.needs_data]
ORDER_ALONE = ("supertuning",)
"""Their start reads which weights are largest, which a factor on all of them does not change."""
IN_FORWARD = ("hira", "peanut", "glora", "miss_bat")
"""They multiply the weight by something in every call, so there is no call without it."""


def on_meta():
    cls, config = tiny_models._config("llama")
    with torch.device("meta"):
        return cls(config)


def traces(model):
    """All that an adapter could leave behind where there are no values to compare."""
    tensors = [(n, id(t), t.requires_grad) for n, t in (*model.named_parameters(), *model.named_buffers())]
    modules = [
        (n, id(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
    ]
    return tensors, modules, list(model.state_dict())


def start(variant, scale):
    """The adapter's tensors on a model whose weights are scaled, which leaves signs and directions but not values."""
    model = tiny_models.build("llama")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    ll.attach(model, variant.config(variant=variant.name))
    return ll.adapter_state_dict(model, "default")


@autocast_on_meta
@pytest.mark.parametrize("method", METHODS)
def test_attach_without_weights(method):
    variant = ll.get_variant(method)
    cfg = variant.config(variant=method)
    one, two = start(variant, 1), start(variant, 3)
    model = on_meta()
    before = traces(model)
    if method in ORDER_ALONE or any(not torch.equal(one[k], two[k]) for k in one):
        with pytest.raises(ll.WeightError, match="on the meta device"):
            ll.attach(model, cfg)
        assert traces(model) == before
        return
    adapter = ll.attach(model, cfg)
    own = {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if "lora_" in n}
    if variant.shared_specs is None:
        assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in one.items()}
    else:  # shared tensors stand on the model, and under their owner's path in a state dict
        assert sorted(tuple(t.shape) for t in own.values()) == sorted(tuple(t.shape) for t in one.values())
    assert all(t.is_meta for t in own.values())
    with pytest.raises(ll.StateError, match="has no values; nothing was saved"):
        ll.adapter_state_dict(model)
    assert adapter.num_parameters() == ll.plan(on_meta(), cfg).trainable
    if method in IN_FORWARD:
        with pytest.raises(ll.WeightError, match="on the meta device"):
            model(input_ids=torch.zeros(2, 5, dtype=torch.long, device="meta"))
    elif getattr(cfg, "positions", "all") == "all":
        assert model(input_ids=torch.zeros(2, 5, dtype=torch.long, device="meta")).logits.shape == (2, 5, 64)
    ll.detach(model)
    assert traces(model) == before


def test_the_question_has_both_answers():
    def reads(name):
        one, two = (start(ll.get_variant(name), s) for s in (1, 3))
        return any(not torch.equal(one[k], two[k]) for k in one)

    assert [name for name in ("lora", "dora", "pissa", "oft") if reads(name)] == ["dora", "pissa"]
