"""B13. Hooks that leak, go stale or are lost: coming, going, copying, failing, compiling."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.testing.case import randomise, run
from lora_lite.testing.toy import Snapshot, toy
from methods import OF_EACH_KIND, every_method


@every_method()
def test_coming_and_going_leaves_nothing(case):
    """Three cycles; then the adapter's tensors are gone from memory too."""
    model, x = case.model(), case.x()
    model.head.weight.requires_grad_(False)  # what was frozen stays so
    before = Snapshot(model, x)
    for _ in range(3):
        case.attach(model)
        randomise(model)
        own = [weakref.ref(t) for m in model.modules() for t in _own(m)]
        assert own
        run(model, x)
        ll.detach(model)
        assert not (d := before.difference(model)), d
    if any(ref() is not None for ref in own):
        gc.collect()
    assert not [t for ref in own if (t := ref()) is not None]


def _own(module):
    tables = (module._parameters, module._buffers)
    return [t for table in tables for k, t in table.items() if k.startswith("lora_") and t is not None]


def test_fifty_cycles():
    case = ll.testing.Case(ll.get_variant("lora"))
    model = case.model()
    before = Snapshot(model, case.x())
    for i in range(50):
        case.attach(model, name=f"n{i}")
        if i % 2:
            ll.rename(model, f"n{i}", "again")
        ll.detach(model)
    assert not (d := before.difference(model)), d


@every_method(quick=OF_EACH_KIND)
def test_copies_are_independent(case):
    model, x = case.random(), case.x()
    y = run(model, x)
    for twin in (copy.deepcopy(model), pickle.load(io.BytesIO(pickle.dumps(model)))):
        assert torch.equal(run(twin, x), y)
        ll.detach(twin)
        assert torch.equal(run(twin, x), run(case.model(), x))
        assert torch.equal(run(model, x), y)


@every_method(lambda case: case.linear, quick=OF_EACH_KIND)
def test_layers_are_called_by_keyword(case):
    model = case.random()
    layer, v = model.layers[0].up, case.x()
    assert torch.equal(layer(input=v), layer(v))
    assert not torch.equal(layer(v), case.model().layers[0].up(v))


class Fails(nn.Module):
    def forward(self, x, *more):
        raise RuntimeError("planted")


@every_method(quick=OF_EACH_KIND)
def test_an_exception_inside_a_call_leaves_no_state(case):
    model, x = case.random("a", "b"), case.x()
    ll.activate(model, "a")
    y = run(model, x)
    before = Snapshot(model)
    inner = model.layers[1].forward
    for scope in (
        lambda: ll.active(model, "b"),
        lambda: ll.rows(model, ["b", None, "a"]),
        lambda: ll.active(model, None),
    ):
        model.layers[1].forward = Fails().forward
        with pytest.raises(RuntimeError, match="planted"), scope():
            run(model, x)
        del model.layers[1].forward
        assert not (d := before.difference(model)), d
        assert torch.equal(run(model, x), y)
    assert model.layers[1].forward == inner


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # asked by the compiler
@every_method(quick=("lora",))
def test_attaching_after_a_compiled_call_acts(case):
    torch.compiler.reset()
    model, x = case.model(), case.x()
    try:
        compiled = torch.compile(model, backend="eager")
        base = compiled(x).detach()
        case.attach(model)
        randomise(model)
        y = compiled(x).detach()
        assert not torch.allclose(y, base, atol=1e-3)
        torch.testing.assert_close(y, run(model, x))
        ll.detach(model)
        assert torch.equal(compiled(x), base)
    finally:
        torch.compiler.reset()


def test_a_replaced_layer_is_noticed():
    """After an attach somebody swaps a target for another module (a fused one, an int8 one)."""
    model = toy()
    ll.attach(model, ll.LoRAConfig(r=3, alpha=7))
    model.layers[0].up = nn.Linear(12, 20)
    with pytest.raises(ll.StateError, match=r"layers\.0\.up"):
        ll.adapter_state_dict(model)
    with pytest.raises(ll.StateError, match=r"layers\.0\.up"):
        ll.merge(model)
    ll.detach(model)
