"""Methods whose layers share tensors: the whole contract, and what is theirs alone."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lora_lite as ll
import shared_methods
from lora_lite import ParamSpec
from lora_lite.cli.variants import trained
from lora_lite.core import registry
from lora_lite.io.native import read
from lora_lite.runtime.model.site import Slot
from lora_lite.runtime.view.layer import LayerView
from lora_lite.testing.case import randomise, run
from lora_lite.testing.toy import Snapshot, toy

METHODS = {"vera": shared_methods.vera, "bank": shared_methods.bank}


@pytest.fixture(autouse=True)
def registry_as_it_was():
    before = dict(registry._TABLE)
    yield
    registry._TABLE.clear()
    registry._TABLE.update(before)


def x():
    return torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(2))


def adapted(variant, *names, **fields):
    model = toy()
    for i, name in enumerate(names or ("default",)):
        ll.attach(model, ll.AdapterConfig(variant=variant.name, r=3, alpha=7, **fields), name=name)
        randomise(model, name, seed=10 + i)
    return model


@pytest.mark.parametrize("make", [METHODS["bank"], pytest.param(METHODS["vera"], marks=pytest.mark.slow)])
def test_the_contract_holds(make):
    ran = ll.testing.check_variant(make())
    assert {"round_trip", "copies_are_independent", "rename_keeps_the_objects", "merge_equals_forward"} <= set(ran)


def test_groups_share_and_are_saved_once():
    model = adapted(shared_methods.vera())
    own = ll.adapter_state_dict(model)
    assert sorted(k for k in own if k.endswith(("_A", "_B"))) == [
        "layers.0.down.lora_A", "layers.0.down.lora_B", "layers.0.up.lora_A", "layers.0.up.lora_B",
    ]  # fmt: skip
    assert own["layers.0.up.lora_A"].shape == (3, 12) and own["layers.0.down.lora_A"].shape == (3, 20)
    shared = [n for n, _ in (*model.named_parameters(), *model.named_buffers()) if n.startswith("lora_")]
    assert len(shared) == 4, "what several layers use does not stand on the model itself"
    x12 = torch.randn(4, 12)
    A, B = own["layers.0.up.lora_A"], own["layers.0.up.lora_B"]
    for i in (0, 1):
        up = model.layers[i].up
        d, b = own[f"layers.{i}.up.lora_d"], own[f"layers.{i}.up.lora_b"]
        want = nn.functional.linear(x12, up.weight, up.bias) + b * ((x12 @ A.mT * d) @ B.mT)
        torch.testing.assert_close(up(x12), want)
    assert trained(shared_methods.vera()) > 0


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_detaching_one_of_two_leaves_the_other(make):
    model = adapted(make(), "a", "b")
    ll.activate(model, "a")
    y, before = run(model, x()), Snapshot(adapted(make(), "a"))
    ll.detach(model, "b")
    assert torch.equal(run(model, x()), y) and list(model.state_dict()) == before.keys
    ll.detach(model)
    assert list(model.state_dict()) == list(toy().state_dict())


def test_sums_of_adapters():
    variant = shared_methods.vera()
    model = adapted(variant, "a", "b")
    first = model.layers[0].up
    with ll.active(model, None):
        want = first(x())
        parts = []
        for name in "ab":
            with ll.active(model, name):
                parts.append(first(x()) - want)
    ll.combine(model, {"a": 0.5, "b": -2.0}, name="ab")
    torch.testing.assert_close(first(x()), want + 0.5 * parts[0] - 2 * parts[1], atol=1e-5, rtol=1e-5)
    variant.factors = None
    with pytest.raises(ll.StateError, match="no pair of low-rank factors"):
        ll.combine(model, {"a": 0.5, "b": 0.5}, name="no")


def test_a_shared_tensor_changed_within_a_rows_block_is_seen():
    model, names = adapted(shared_methods.bank(), "a", "b"), ["a", "b", "a"]
    with torch.no_grad(), ll.rows(model, names):
        before = model(x())
        dict(model.named_parameters())["lora_bank:layers:0:up@a"].mul_(-3)
        after = model(x())
    with torch.no_grad(), ll.rows(model, names):
        want = model(x())
    assert torch.equal(after, want) and not torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_a_shared_tensor_comes_to_the_layers_device():
    model = adapted(shared_methods.bank())
    layer = model.layers[1].down.to("meta")
    slot: Slot = layer.__dict__["_lora_lite_site"].slots["default"]
    view = LayerView(layer, slot, torch.float32)
    assert view.lora_bank.device.type == "meta"
    home = LayerView(model.layers[0].down, model.layers[0].down.__dict__["_lora_lite_site"].slots["default"], None)
    assert home.lora_bank is model._parameters["lora_bank:layers:0:up"], "nothing is copied where nothing moves"


# ---- files


def saved(tmp_path, variant):
    model = adapted(variant)
    path = ll.save(model, tmp_path / "x")
    head, tensors = read(path)
    return run(model, x()), path, head, tensors


def rewrite(path, head, tensors):
    save_file(tensors, str(path), {"lora_lite": json.dumps(head)})
    return path


def test_a_file_names_the_owners(tmp_path):
    y, path, head, tensors = saved(tmp_path, shared_methods.vera())
    entries = {p: e["shared"] for p, e in head["targets"].items()}
    assert entries == {
        f"layers.{i}.{kind}": {"lora_A": f"layers.0.{kind}", "lora_B": f"layers.0.{kind}"}
        for i in (0, 1)
        for kind in ("up", "down")
    }
    for entry in head["targets"].values():  # as written before the owners stood there
        del entry["shared"]
    old = toy()
    ll.load(old, rewrite(path, head, tensors))
    assert torch.equal(run(old, x()), y)


def test_the_owner_is_the_files_whatever_the_models_order(tmp_path):
    y, path, _, _ = saved(tmp_path, shared_methods.bank())
    other = toy()
    for block in other.layers:
        block._modules = {k: block._modules[k] for k in ("down", "up")}
    ll.load(other, path)
    assert torch.equal(run(other, x()), y)
    assert next(iter(ll.plan(other, ll.AdapterConfig(variant="bank_for_tests", r=3)).targets)).path == "layers.0.down"


HOSTILE = {
    "no target": lambda e: e["layers.1.up"].update(shared={"lora_bank": "layers.7.up"}),
    "an owner that does not own": lambda e: e["layers.1.up"].update(shared={"lora_bank": "layers.1.up"}),
    "another tensor": lambda e: e["layers.1.up"].update(shared={"lora_bank": "layers.0.up", "lora_c": "layers.0.up"}),
    "no tensor": lambda e: e["layers.1.up"].update(shared={}),
    "a list": lambda e: e["layers.1.up"].update(shared=["lora_bank"]),
    "a list of owners": lambda e: e["layers.1.up"].update(shared={"lora_bank": ["layers.0.up"]}),
    "null": lambda e: e["layers.1.up"].update(shared=None),
    "another owner everywhere": lambda e: [t.update(shared={"lora_bank": "layers.1.up"}) for t in e.values()],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_owners_that_are_none_are_refused(tmp_path, what):
    _, path, head, tensors = saved(tmp_path, shared_methods.bank())
    HOSTILE[what](head["targets"])
    model = toy()
    before = Snapshot(model)
    with pytest.raises(ll.FileError):
        ll.load(model, rewrite(path, head, tensors))
    assert not (d := before.difference(model)), d


def test_a_method_that_shares_nothing_refuses_owners(tmp_path):
    model = toy()
    ll.attach(model, ll.LoRAConfig(r=3, alpha=7))
    path = ll.save(model, tmp_path / "x")
    head, tensors = read(path)
    head["targets"]["layers.1.up"]["shared"] = {"lora_A": "layers.0.up"}
    with pytest.raises(ll.FileError, match="shares"):
        ll.load(toy(), rewrite(path, head, tensors))


# ---- what authors may do, and what they are told


def test_init_and_a_change_of_rank_see_shared_tensors(tmp_path):
    variant, seen = shared_methods.bank(), []

    def init(layer, cfg):
        seen.append(layer.lora_bank)
        layer.lora_c = layer.lora_c + layer.lora_bank.sum()

    def smaller(model, targets, cfg, data):
        targets[1].resize(r=2, alpha=5)

    variant.init, variant.group_init = staticmethod(init), staticmethod(smaller)
    model = adapted(variant)
    assert len(seen) == 4 and all(t is seen[0] for t in seen)
    own = ll.adapter_state_dict(model)
    assert own["layers.0.down.lora_c"].shape == (2, 5) and own["layers.1.down.lora_c"].shape == (3, 5)
    fresh = toy()
    ll.load(fresh, ll.save(model, tmp_path / "x"))
    assert torch.equal(run(fresh, x()), run(model, x()))


def test_compacting_keeps_shared_tensors(tmp_path):
    variant = shared_methods.bank()

    def compact(layer, rank):
        assert layer.lora_bank.shape == (5, 20)
        return {"r": rank}, {"lora_c": layer.lora_c[:rank], "lora_B": layer.lora_B[:, :rank] * (rank / 3)}

    variant.compact = staticmethod(compact)
    model = adapted(variant)
    for block in model.layers:
        for layer in (block.up, block.down):
            layer.lora_B.data[:, 2:] = 0
    y = run(model, x())
    ll.compact(model, rank=2)
    assert model.layers[0].up.lora_c.shape == (2, 5)
    torch.testing.assert_close(run(model, x()), y)
    variant.compact = staticmethod(lambda layer, rank: None if layer.path == "layers.0.up" else compact(layer, rank))
    before = Snapshot(model)
    with pytest.raises(ll.TargetError, match=r"layers\.0\.down shares lora_bank with layers\.0\.up"):
        ll.compact(model, rank=1)
    assert not (d := before.difference(model)), d


def test_the_first_target_of_a_group_must_stay():
    variant = shared_methods.bank()
    variant.group_init = staticmethod(lambda model, targets, cfg, data: targets.pop(0))
    model = toy()
    before = Snapshot(model)
    with pytest.raises(ll.TargetError, match="must keep the first target"):
        ll.attach(model, ll.AdapterConfig(variant=variant.name, r=3))
    assert not (d := before.difference(model)), d


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (lambda targets, cfg: {"bank": ParamSpec((3,))}, "shared_specs names a tensor 'bank'"),
        (lambda targets, cfg: {"lora_c": ParamSpec((3,))}, "a second 'lora_c'"),
        (lambda targets, cfg: [(targets[i:], {"lora_bank": ParamSpec((5, 20))}) for i in (0, 3)], "layers.1.down: "),
    ],
    ids=["name", "own", "twice"],
)
def test_wrong_specs_are_refused(specs, words):
    variant = shared_methods.bank()
    variant.shared_specs = staticmethod(specs)
    with pytest.raises(ll.TargetError, match=words):
        adapted(variant)
