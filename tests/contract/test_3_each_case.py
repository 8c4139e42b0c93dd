"""Nothing is silent: each case by name. The error says which adapter or path, and what to type instead; the model is as
before."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import Block, FakeQuantLinear, Snapshot, batches, toy

CFG = ll.LoRAConfig(r=3, alpha=7)


def x(*shape):
    return torch.randn(*(shape or (3, 5)), 12, generator=torch.Generator().manual_seed(2))


def adapted(*names):
    model = toy()
    for i, name in enumerate(names or ("default",)):
        ll.attach(model, CFG, name=name)
        randomise(model, name, seed=i)
    return model


def refuses(model, error, *words, call):
    """`call` raises `error` with all words, and the model is bit for bit as it was."""
    before = Snapshot(model)
    with pytest.raises(error) as e:
        call()
    missing = [w for w in words if w not in str(e.value)]
    assert not missing, f"{missing} not in: {e.value}"
    assert not (d := before.difference(model)), d


def test_an_output_that_is_cut_from_its_inputs_gradient():
    class Cut(FakeQuantLinear):
        def forward(self, v):
            return super().forward(v.detach())

    model = toy(kind=Cut)
    ll.attach(model, CFG)
    with torch.no_grad():
        model(x())  # without gradients there is nothing to lose
    with pytest.raises(ll.WeightError, match=r"layers.0.up.*cut from its input's gradient.*differentiable"):
        model(x().requires_grad_())


def test_a_weight_on_the_meta_device():
    model = toy()
    model.layers[1].down.to("meta")
    before = list(model.state_dict())
    with pytest.raises(ll.WeightError, match="layers.1.down.*meta.*Attach before"):
        ll.attach(model, CFG)
    assert list(model.state_dict()) == before and all(p.requires_grad for p in model.parameters())


def test_a_wholly_empty_model_can_be_adapted():
    with torch.device("meta"):
        model = nn.Sequential(Block(True, nn.Linear), Block(True, nn.Linear))
    ll.attach(model, CFG)
    assert model[0].up.lora_A.is_meta


def test_attaching_after_data_parallel_wrapping(monkeypatch):
    class DistributedDataParallel(nn.Module):  # the name is what is looked at: the real one needs a process group
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = DistributedDataParallel(toy())
    refuses(model, ll.StateError, "DistributedDataParallel", "Attach first", call=lambda: ll.attach(model, CFG))
    wrapped = DistributedDataParallel(adapted())
    assert list(ll.adapters(wrapped)) == ["default"]


def test_while_merged(tmp_path):
    model = adapted("a", "b")
    path = ll.save(model, tmp_path / "a", name="a")
    ll.merge(model, name="a")
    for call in (
        lambda: ll.attach(model, CFG, name="c"),
        lambda: ll.load(model, path, name="c"),
        lambda: ll.save(model, tmp_path / "again", name="a"),
        lambda: ll.detach(model, "b"),
        lambda: ll.activate(model, "b"),
        lambda: ll.rename(model, "a", "z"),
        lambda: ll.active(model, "b").__enter__(),
        lambda: ll.rows(model, ["b"]).__enter__(),
        lambda: ll.export(model, tmp_path / "peft", name="a"),
    ):
        refuses(model, ll.StateError, "merged", "ll.unmerge(model)", call=call)
    refuses(model, ll.StateError, "'a'", "ll.unmerge(model)", call=lambda: ll.merge(model, name="b"))
    assert not (tmp_path / "again.safetensors").exists()
    ll.unmerge(model)
    ll.unmerge(model)


def test_a_trainable_tensor_outside_of_the_saved_set(tmp_path):
    model = adapted()
    model.head.weight.requires_grad_(True)
    with pytest.raises(ll.StateError, match=r"'head.weight'.*requires_grad_\(False\)"):
        ll.save(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_training_that_diverged_is_not_saved(tmp_path):
    model = adapted()
    model.layers[0].up.lora_A.data[0, 0] = float("nan")
    with pytest.raises(ll.StateError, match=r"'default'.*'layers.0.up.lora_A'"):
        ll.save(model, tmp_path / "x")
    with pytest.raises(ll.StateError, match="layers.0.up"):
        ll.merge(model)


def test_strange_names_are_no_reason_to_save_or_lose(tmp_path):
    """The base has a module named lora_head and a parameter of its own named lora_A: ownership decides, not names."""
    model = toy()
    model.lora_head = nn.Linear(12, 3).requires_grad_(False)
    ll.attach(model, ll.LoRAConfig(r=3, alpha=7, target_names=("up",)))
    file = ll.save(model, tmp_path / "x")
    assert all(".up.lora_" in k for k in ll.adapter_state_dict(model)) and file.stat().st_size < 10_000
    model.lora_head.weight.requires_grad_(True)
    with pytest.raises(ll.StateError, match="'lora_head.weight'"):
        ll.save(model, tmp_path / "x")
    taken = toy()
    taken.layers[1].up.lora_A = nn.Parameter(torch.zeros(2))
    refuses(taken, ll.StateError, "layers.1.up", "'lora_A'", "another adapter name", call=lambda: ll.attach(taken, CFG))
    taken = toy()
    taken.layers[1].down.lora_B = 3
    refuses(taken, ll.StateError, "layers.1.down", "'lora_B'", call=lambda: ll.attach(taken, CFG))


def test_check_names_the_targets_that_learn_nothing():
    class Bypass(Block):
        def forward(self, h):
            return h + torch.nn.functional.linear(self.up(h).tanh(), self.down.weight, self.down.bias)

    model = toy()
    model.layers[1] = Bypass(True, nn.Linear)
    ll.attach(model, CFG)
    with pytest.raises(ll.StateError, match="backward did not run"):
        ll.check(model)
    with pytest.warns(ll.LoraLiteWarning, match=r"'layers\.1\.down' was never called"):
        y = model(x())
    y.square().sum().backward()
    with pytest.raises(
        ll.StateError, match=r"'default': 1 of 4 targets got no gradient: 'layers.1.down'.*exclude_names"
    ):
        ll.check(model)
    ll.detach(model)
    ll.attach(model, ll.LoRAConfig(r=3, exclude_names=(r"layers\.1\.down",)))
    model(x()).square().sum().backward()
    assert ll.check(model).learning == {"default": 3}
    model.layers[0].up.lora_B.grad[0, 0] = float("inf")
    with pytest.raises(ll.StateError, match=r"not finite on 'layers.0.up'"):
        ll.check(model)
    ll.activate(model, None)
    model.zero_grad()
    with pytest.raises(ll.StateError, match="not active"):
        ll.check(model)


def test_names():
    model = adapted("a")
    for bad in ("", "a.b", "a b", "a@b", "a/b"):
        refuses(model, ll.StateError, "letters", call=lambda bad=bad: ll.attach(model, CFG, name=bad))
        refuses(model, ll.StateError, "letters", call=lambda bad=bad: ll.rename(model, "a", bad))
    refuses(model, ll.StateError, "'a'", "ll.detach", call=lambda: ll.attach(model, CFG, name="a"))
    refuses(model, ll.StateError, "no adapter is called 'A'", "'a'", call=lambda: ll.detach(model, "A"))
    refuses(model, ll.StateError, "no adapter is called 'b'", call=lambda: ll.activate(model, ["a", "b"]))
    with pytest.raises(ll.StateError, match="Attach one with ll.attach"):
        ll.activate(toy(), "a")
    with pytest.raises(ll.StateError, match="no adapter"):
        ll.detach(toy())


def test_inside_a_selection_the_adapters_stay(tmp_path):
    """What would be undone, or applied twice, at the end of the block raises inside of it."""
    model = adapted("a", "b")
    path = ll.save(model, tmp_path / "a", name="a")
    for scope in (lambda: ll.active(model, "a"), lambda: ll.rows(model, ["a", None, "b"])):
        with scope():
            for call in (
                lambda: ll.attach(model, CFG, name="c"),
                lambda: ll.load(model, path, name="c"),
                lambda: ll.detach(model, "a"),
                lambda: ll.detach(model),
                lambda: ll.rename(model, "a", "c"),
                lambda: ll.merge(model),
                lambda: ll.merge(model, name="a"),
                lambda: ll.activate(model, "b"),
            ):
                refuses(model, ll.SelectionError, "leave the block first", call=call)
    assert ll.adapters(model)["b"].active and not ll.adapters(model)["a"].active


def test_two_threads_and_one_model():
    import threading

    model, errors = adapted("a", "b"), []

    def other():
        try:
            with ll.active(model, "b"):
                pass
        except ll.LoraLiteError as e:
            errors.append(str(e))

    with ll.active(model, "a"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(errors) == 1 and "another thread" in errors[0]


def test_a_part_of_an_adapted_model_is_no_model_of_its_own():
    """Two roots over the same layers would each choose adapters that the other does not know."""
    model = adapted()
    refuses(
        model, ll.StateError, "0.up", "larger model", "whole model", call=lambda: ll.attach(model.layers, CFG, name="b")
    )
    inner = toy()
    ll.attach(inner.layers, CFG)
    refuses(inner, ll.StateError, "'layers'", "ll.detach", call=lambda: ll.attach(inner, CFG, name="b"))


def test_selections_that_mean_nothing():
    model = adapted("a", "b")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ll.SelectionError, match="finite"):
            ll.activate(model, {"a": bad})
    for bad in ([], "a"):
        with pytest.raises(ll.SelectionError, match="list"), ll.rows(model, bad):
            pass
    with ll.rows(model, ["a", None, "b"]), pytest.raises(ll.SelectionError, match=r"layers.0.up.*3 rows.*batch-first"):
        model(x(4, 5))
    with pytest.raises(ll.StateError, match=r"one of \['a', 'b'\]"):
        ll.activate(model, ["a", "b"])
        ll.save(model, "never")


def test_merging_nothing():
    model = adapted()
    ll.activate(model, None)
    refuses(model, ll.StateError, "no adapter is active", "name=", call=lambda: ll.merge(model))


def test_a_layer_that_was_replaced_or_stripped():
    model = adapted()
    model.layers[0].up = nn.Linear(12, 20)
    with pytest.raises(ll.StateError, match=r"'default'.*layers.0.up.lora_A is gone.*load"):
        ll.adapter_state_dict(model)
    with pytest.raises(ll.StateError, match=r"layers.0.up"):
        ll.merge(model)
    ll.detach(model)  # what is left goes
    assert not [k for k in model.state_dict() if "lora" in k] and not model.layers[1].up._forward_hooks


def test_moved_to_another_dtype(recwarn):
    """model.to(bfloat16) after the attach rounds the adapter too: it still runs, and the next attach is fp32 again."""
    model = adapted().bfloat16()
    assert model(x().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("layer", [nn.Bilinear(4, 4, 4), nn.Identity(4, 4)])
def test_not_everything_with_features_is_linear(layer):
    with pytest.raises(ll.TargetError, match="linear"):
        ll.plan(nn.Sequential(layer), CFG)


def test_configs():
    for fields, word in (
        (dict(r=0), "r must be"),
        (dict(r=2.5), "r must be int"),
        (dict(r=True), "r must be int"),
        (dict(r=10**9), "r must be"),
        (dict(alpha=0.0), "alpha"),
        (dict(alpha=float("nan")), "alpha"),
        (dict(alpha="8"), "alpha"),
        (dict(dropout=1.0), "dropout"),
        (dict(dtype="load"), "dtype"),
        (dict(target_roles=("raeder",)), "reader"),
        (dict(target_names=("(",)), "regular expression"),
        (dict(target_names=(3,)), "target_names"),
        (dict(layers=("one",)), "layers"),
        (dict(rank_pattern={"a": 0}), "rank_pattern"),
        (dict(rank_pattern=["a"]), "rank_pattern"),
        (dict(alpha_pattern={"a": float("inf")}), "alpha_pattern"),
        (dict(seed="x"), "seed"),
    ):
        with pytest.raises(ll.ConfigError, match=word):
            ll.LoRAConfig(**fields)
    with pytest.raises(ll.ConfigError, match="'lora'"):
        ll.plan(toy(), ll.AdapterConfig(variant="lorra"))
    with pytest.raises(ll.ConfigError, match="variant="):
        ll.plan(toy(), ll.AdapterConfig())
    with pytest.raises(ll.ConfigError, match="LoRAConfig"):
        ll.plan(toy(), ll.LoRAConfig(variant="eva"))
    assert ll.LoRAConfig(target_names="q_proj").target_names == ("q_proj",)
    assert ll.LoRAConfig(dtype=torch.bfloat16).dtype == "bfloat16"


def test_public_names_are_spelled_out():
    with pytest.raises(AttributeError, match="'attach'"):
        _ = ll.atach
    assert sys.modules["lora_lite.testing"] is ll.testing


def test_a_padded_calibration_batch_without_tensors():
    model = toy()
    for data, word in (
        ([{"text": ["a"]}], "return_tensors"),
        ([], "empty"),
        ([3], "dict"),
        ([{k: v for k, v in b.items() if k != "labels"} for b in batches()], "labels"),
    ):
        cfg = ll.LoRAGAConfig(r=2)
        refuses(model, ll.ConfigError, word, call=lambda d=data, c=cfg: ll.attach(model, c, d))
