"""B7. Trained side parts that are not saved, or strangers that are: the file holds what is trained, and no more."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.io.native import read
from lora_lite.testing.case import randomise, run, train
from methods import OF_EACH_KIND, every_method, plain, trains


def with_strangers(case):
    """The toy with modules and tensors of its own that are called as an adapter's could be."""
    model = case.model()
    model.lora_head = nn.Linear(12, 3)
    model.layers[0].my_lora_A = nn.Parameter(torch.ones(2))
    model.register_buffer("lora_B", torch.ones(2))
    return model


@every_method()
def test_the_file_holds_the_plan_and_nothing_else(case, tmp_path):
    model = with_strangers(case)
    handle = case.attach(model)
    randomise(model)
    path = ll.save(model, tmp_path / "x")
    tensors = read(path)[1]
    targets = tuple(f"{t}.lora_" for t in handle.targets)
    assert all(k.startswith(targets) for k in tensors) and not [k for k in tensors if "my_lora" in k or "head" in k]
    assert path.stat().st_size <= sum(t.numel() * t.element_size() for t in tensors.values()) + 65_536


@every_method(trains)
def test_a_trainable_tensor_outside_of_the_file_is_named(case, tmp_path):
    model = with_strangers(case)
    case.attach(model)
    if case.variant.on_step is not None:
        pytest.skip("its save asks for the schedule first")
    model.lora_head.weight.requires_grad_(True)
    with pytest.raises(ll.StateError, match=r"lora_head\.weight"):
        ll.save(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@every_method(lambda case: plain(case) and case.linear and not case.variant.needs_data, quick=OF_EACH_KIND)
def test_a_head_trained_beside_the_method_comes_back(case, tmp_path):
    model = case.model().train()
    ll.attach(model, case.cfg(train_modules=("head",)))
    head = model.head.weight.clone()
    train(case, model, steps=2)
    batch = ll.testing.batches()[0]
    want = run_logits(model.eval(), batch)
    assert torch.equal(model.head.weight, head), "the base's head was written"
    path = ll.save(model, tmp_path / "x")
    assert [k for k in read(path)[1] if k.startswith("head.lora_")]
    fresh = case.model()
    assert not torch.equal(run_logits(fresh, batch), want)
    ll.load(fresh, path)
    assert torch.equal(run_logits(fresh, batch), want)
    assert torch.equal(run(fresh, case.x()), run(model, case.x()))


@torch.no_grad()
def run_logits(model, batch):
    return model(**batch).logits
