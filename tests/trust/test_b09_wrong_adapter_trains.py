"""B9. The wrong adapter trains: active and trainable are two flags, and only who is both is written."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from lora_lite.testing.case import run
from methods import OF_EACH_KIND, every_method, plain


def flags(model):
    """Adapter -> (active, trainable, whether all of its trained tensors ask for a gradient)."""
    return {
        n: (h.active, h.trainable, [p.requires_grad for p in h.parameters()] == [h.trainable] * len([*h.parameters()]))
        for n, h in ll.adapters(model).items()
    }


@every_method(plain)
def test_scopes_and_names_leave_the_flags_alone(case):
    model = case.random("a", "b")
    handles = ll.adapters(model)
    handles["a"].trainable, handles["b"].trainable = False, True
    want = {"a": (False, False, True), "b": (True, True, True)}
    assert flags(model) == want
    for scope in (
        lambda: ll.active(model, None),
        lambda: ll.active(model, ["a", "b"]),
        lambda: ll.rows(model, ["a", None, "b"]),
    ):
        with scope():
            run(model, case.x())
        assert flags(model) == want
    ll.activate(model, "a")
    ll.activate(model, "b")
    assert flags(model) == want
    ll.rename(model, "a", "c")
    assert flags(model) == {"c": want["a"], "b": want["b"]}


@every_method(plain, quick=OF_EACH_KIND)
def test_only_the_active_trainable_adapter_is_written(case):
    """Everything is handed to one optimiser; adapter b alone moves, and the base never does."""
    model = case.random("a", "b").train()
    for handle in ll.adapters(model).values():
        handle.trainable = True
    base = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    before = {n: ll.adapter_state_dict(model, n) for n in "ab"}
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        opt.zero_grad()
        model(case.x()).square().sum().backward()
        opt.step()
    after = {n: ll.adapter_state_dict(model, n) for n in "ab"}
    assert all(torch.equal(before["a"][k], after["a"][k]) for k in before["a"])
    assert any(not torch.equal(before["b"][k], after["b"][k]) for k in before["b"])
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in base.items())


@every_method(plain, quick=("lora", "dora", "ia3", "loreft"))
def test_loading_and_detaching_leave_the_others_as_they_are(case, tmp_path):
    model = case.random("a", "b")
    path = ll.save(model, tmp_path / "a", name="a")
    handles = ll.adapters(model)
    handles["a"].trainable, handles["b"].trainable = False, True
    ll.load(model, path, name="c")
    assert {n: f[1:] for n, f in flags(model).items()} == {"a": (False, True), "b": (True, True), "c": (False, True)}
    ll.detach(model, "a")
    assert {n: f[1:] for n, f in flags(model).items()} == {"b": (True, True), "c": (False, True)}
    ll.detach(model, "b")
    with pytest.raises(ll.StateError, match="no attached adapter is trainable"):
        ll.check(model)
