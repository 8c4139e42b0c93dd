"""How layers are called, copied, moved and thrown away."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn

import lora_lite as ll
import tiny_models
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import Snapshot, toy

CFG = ll.LoRAConfig(r=3, alpha=7)
HRA = ll.HRAConfig(r=2)


def x(*shape):
    return torch.randn(*(shape or (3, 5)), 12, generator=torch.Generator().manual_seed(2))


def adapted(*names, cfg=CFG):
    model = toy()
    for i, name in enumerate(names or ("default",)):
        ll.attach(model, cfg, name=name)
        randomise(model, name, seed=i)
    return model


class Odd(nn.Linear):
    """Returns a tuple, and has more arguments than one."""

    def forward(self, hidden_states, scale=1.0):
        return super().forward(hidden_states) * scale, "state"


@pytest.mark.parametrize("cfg", [CFG, HRA], ids=["output", "input"])
def test_keyword_calls(cfg):
    model = adapted(cfg=cfg)
    layer = model.layers[0].up
    with torch.no_grad():
        assert torch.equal(layer(input=x()), layer(x()))
        with ll.active(model, None):
            assert not torch.allclose(model.layers[0].up(input=x()), adapted(cfg=cfg).layers[0].up(input=x()))


@pytest.mark.parametrize("cfg", [CFG, HRA], ids=["output", "input"])
def test_tuple_outputs_and_further_arguments(cfg):
    model = nn.Sequential(nn.Linear(12, 12))
    model[0] = Odd(12, 20)
    ll.attach(model, cfg)
    randomise(model)
    y, state = model[0](x(), scale=2.0)
    assert state == "state"
    for call in (dict(hidden_states=x(), scale=2.0), dict(scale=2.0, hidden_states=x())):
        assert torch.equal(model[0](**call)[0], y)
    with ll.active(model, None):
        assert not torch.allclose(model[0](x(), scale=2.0)[0], y)


def test_an_output_that_is_no_tensor_raises():
    class Strange(nn.Linear):
        def forward(self, v):
            return {"y": super().forward(v)}

    model = nn.Sequential(Strange(12, 20))
    before = Snapshot(model)
    with pytest.raises(ll.TargetError, match="does not return one vector for each of its input"):
        ll.attach(model, CFG)
    assert not (d := before.difference(model)), d


def test_input_shapes():
    model = adapted()
    for shape in ((), (1,), (7,), (2, 3), (2, 3, 4), (0,), (2, 0)):
        v = torch.randn(*shape, 12)
        assert model(v).shape == v.shape
    wide = torch.randn(12, 5).mT  # not contiguous
    torch.testing.assert_close(model(wide), model(wide.contiguous()))
    with torch.inference_mode():
        torch.testing.assert_close(model(wide), model(wide.contiguous()))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how):
    model = adapted("a", "b")
    model.train()
    optimizer_params = {id(p) for p in model.parameters()}
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(x()), model(x())) and list(ll.adapters(twin)) == ["a", "b"]
    assert not optimizer_params & {id(p) for p in twin.parameters()}
    with ll.active(twin, "a"):
        assert torch.equal(model(x()), adapted("a", "b")(x()))
    ll.detach(twin)
    assert ll.adapters(twin) == {} and list(ll.adapters(model)) == ["a", "b"]
    ll.detach(model, "a")
    assert list(ll.adapters(model)) == ["b"]


def test_a_copy_made_inside_a_selection_is_free():
    model = adapted("a", "b")
    with ll.active(model, "a"):
        twin = copy.deepcopy(model)
    ll.activate(twin, "b")
    ll.detach(twin, "a")
    assert torch.equal(twin(x()), model(x()))


def test_fifty_lives_leave_nothing():
    model = toy()
    before = Snapshot(model, x())
    seen = []
    for i in range(50):
        handle = ll.attach(model, CFG if i % 2 else HRA, name=f"n{i % 3}")
        model(x())
        seen += [weakref.ref(p) for p in handle.parameters()]
        ll.detach(model)
        del handle
    gc.collect()
    assert not [r for r in seen if r() is not None], "an adapter's tensors outlive it"
    assert not (d := before.difference(model)), d


def test_an_exception_inside_a_forward_leaves_no_state():
    class Fails(Exception):
        pass

    model, armed = adapted("a", "b"), [True]

    def explode(*_):
        if armed[0]:
            raise Fails

    handle = model.layers[1].down.register_forward_hook(explode)
    for scope in (lambda: ll.active(model, "a"), lambda: ll.rows(model, ["a", None, "b"])):
        with pytest.raises(Fails), scope():
            model(x())
        with ll.rows(model, ["a", None, "b", "a"]):  # a layer alone has no batch but its own input's
            assert model.layers[0].up(x(4)).shape == (4, 20)
    handle.remove()
    assert torch.equal(model(x()), adapted("a", "b")(x()))
    assert torch.equal(model(x(7)), adapted("a", "b")(x(7))), "the batch size of the failed call is remembered"


def test_moving_the_model():
    model = adapted()
    y = model(x())
    assert model.double()(x().double()).dtype == torch.float64
    torch.testing.assert_close(model.float()(x()), y)
    assert model.to("meta").layers[0].up.lora_A.is_meta


def test_a_layer_called_twice_in_one_forward():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(12, 12)

        def forward(self, v):
            return self.fc(self.fc(v))

    torch.manual_seed(0)
    model = Twice()
    ll.attach(model, CFG)
    randomise(model)
    W = model.fc.weight + 7 / 3 * model.fc.lora_B @ model.fc.lora_A
    torch.testing.assert_close(model(x()), (x() @ W.mT + model.fc.bias) @ W.mT + model.fc.bias)


def test_beams_and_rows_of_generate():
    """num_beams repeats every row; one adapter per prompt, as in runs of their own."""
    model, ids = tiny_models.build("llama"), tiny_models.batch("llama", rows=3)["input_ids"]
    for i, name in enumerate("ab"):
        ll.attach(model, CFG, name=name)
        randomise(model, name, seed=i, scale=0.5)

    def generate(v, **kw):
        kw |= {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        return model.generate(v, attention_mask=torch.ones_like(v), **kw)

    for kw in ({}, {"num_beams": 3}):
        alone = []
        for i, name in enumerate(("b", None, "a")):
            with ll.active(model, name):
                alone.append(generate(ids[i : i + 1], **kw))
        with ll.rows(model, ["b", None, "a"]):
            mixed = generate(ids, **kw)
        assert torch.equal(mixed, torch.cat(alone)), kw
        assert len({tuple(r[0, -5:].tolist()) for r in alone}) > 1, "all adapters say the same"


def test_methods_and_ranks_in_one_batch():
    model = toy()
    configs = {
        "lora": ll.LoRAConfig(r=3, alpha=7), "wide": ll.LoRAConfig(r=9, alpha=2, target_names=("up",)),
        "hra": HRA, "dora": ll.DoRAConfig(r=2, alpha=5), "ia3": ll.IA3Config(),
    }  # fmt: skip
    for i, (name, cfg) in enumerate(configs.items()):
        ll.attach(model, cfg, name=name)
        randomise(model, name, seed=i)
    names = ["hra", None, "wide", "lora", "ia3", "dora", "lora", None]
    batch, alone = x(8, 4), {}
    with torch.no_grad():
        for name in (*configs, None):
            with ll.active(model, name):
                alone[name] = model(batch)
        with ll.rows(model, names):
            mixed = model(batch)
            batch[3] = float("nan")
            bad = model(batch)
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], alone[name][i], atol=2e-6, rtol=0)
        assert name is not None or torch.equal(mixed[i], alone[None][i])
    assert bad[3].isnan().any() and bad[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()
    assert len({str(v) for v in alone.values()}) == len(alone)


def test_two_adapters_that_both_rewrite_the_input_act_in_attach_order():
    model = toy()
    ll.attach(model, HRA, name="first")
    ll.attach(model, ll.IA3FFConfig(), name="second")
    for i, name in enumerate(("first", "second")):
        randomise(model, name, seed=i)
    ll.activate(model, ["second", "first"])  # the order of the call is not the order of acting
    seen = {}
    layer = model.layers[0].up
    for choice in ("first", "second", ["first", "second"], ["second", "first"]):
        with torch.no_grad(), ll.active(model, choice):
            hook = layer.register_forward_pre_hook(lambda m, a, k: seen.update(x=a[0]), with_kwargs=True)
            layer(x())
            hook.remove()
        seen[str(choice)] = seen.pop("x")
    assert torch.equal(seen["['first', 'second']"], seen["['second', 'first']"])
    gate = seen["second"] / x()
    torch.testing.assert_close(seen["['first', 'second']"], gate * seen["first"], atol=1e-5, rtol=1e-4)


def test_the_input_that_two_adapters_rewrite_by_halves_is_rewritten_twice():
    model = toy()
    for i, name in enumerate(("first", "second")):
        ll.attach(model, HRA, name=name)
        randomise(model, name, seed=i)
    seen, layer = {}, model.layers[0].up
    for choice in ({"first": 0.5}, {"second": 0.25}, {"first": 0.5, "second": 0.25}):
        with torch.no_grad(), ll.active(model, choice):
            hook = layer.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
            for unit in (x(), torch.eye(12)):
                layer(unit)
                seen[len(choice), next(iter(choice)), len(unit)] = seen["x"]
            hook.remove()
    second = seen[1, "second", 12]  # x @ second: what the second alone makes of any input
    torch.testing.assert_close(seen[2, "first", 3], seen[1, "first", 3] @ second)
    assert not torch.allclose(seen[1, "first", 3], x(), atol=1e-2)
