"""B1. An adapter that loads and acts as the base: the loaded one is the trained one, or loading raises."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import lora_lite as ll
from lora_lite.io.native import read
from lora_lite.testing.case import run, train
from lora_lite.testing.toy import Snapshot
from methods import every_method


def saved(case, folder, steps=3):
    """(output, file) of an adapter that was trained, or fitted."""
    model = case.fresh().train()
    if case.variant.trains:
        train(case, model, steps=steps, lr=3e-2)
    y = run(model.eval(), case.x())
    assert not torch.equal(y, run(case.model(), case.x())), "the adapter of this test does nothing"
    return y, ll.save(model, folder / "trained")


@every_method()
def test_what_was_trained_is_what_is_loaded(case, tmp_path):
    y, path = saved(case, tmp_path)
    fresh = case.model()
    ll.load(fresh, path)
    if case.variant.compact is None:
        assert torch.equal(run(fresh, case.x()), y)
    else:  # the file holds the live triplets alone: the same sums in shorter products
        torch.testing.assert_close(run(fresh, case.x()), y, atol=1e-6, rtol=0)


def rename_a_parent(head, tensors, path):
    """As where a release of a library moves the language model."""
    moved = {k.replace("layers.", "language_model.layers.", 1): v for k, v in tensors.items()}
    targets = {k.replace("layers.", "language_model.layers.", 1): v for k, v in head["targets"].items()}
    return {**head, "targets": targets}, moved, "language_model"


def drop_a_key(head, tensors, path):
    return head, {k: v for k, v in tensors.items() if k != path}, path


def add_a_key(head, tensors, path):
    return head, {**tensors, f"{path}_more": torch.ones(2)}, f"{path}_more"


def change_the_prefix(head, tensors, path):
    return head, {f"base_model.model.{k}": v for k, v in tensors.items()}, "base_model.model"


@pytest.mark.parametrize("damage", [rename_a_parent, drop_a_key, add_a_key, change_the_prefix])
@every_method(quick=("lora", "dora", "ia3", "loreft", "caa"))
def test_a_file_that_does_not_fit_raises_and_names_what(case, damage, tmp_path):
    _, path = saved(case, tmp_path, steps=1)
    head, tensors = read(path)
    head, tensors, word = damage(head, tensors, next(iter(tensors)))
    save_file(tensors, str(tmp_path / "bad.safetensors"), {"lora_lite": json.dumps(head)})
    model = case.model()
    before = Snapshot(model, case.x())
    with pytest.raises(ll.LoraLiteError) as e:
        ll.load(model, tmp_path / "bad.safetensors")
    assert word in str(e.value)
    assert not (d := before.difference(model)), d
