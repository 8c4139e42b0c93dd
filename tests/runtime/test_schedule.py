"""Schedules: driven by the optimiser, never forgotten, and going on after a save. Penalties."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.core import registry
from lora_lite.core.errors import StateError


class Counting(ll.Variant):
    """Writes the step into its tensor, and what it saw of the gradient."""

    name = "counting_for_tests"
    seen: list = []

    @staticmethod
    def param_specs(d_in, d_out, cfg):
        return {
            "lora_b": ll.ParamSpec((d_out,)),
            "lora_n": ll.ParamSpec((1,), as_buffer=True),
        }

    @staticmethod
    def forward(layer, x, y):
        return y + layer.lora_b

    @staticmethod
    def on_step(targets, cfg, step):
        for view in targets:
            view.master("lora_n").fill_(step)
            Counting.seen.append((view.path, step, targets.total_steps, view.master("lora_b").grad.clone()))
        assert not torch.is_grad_enabled() and cfg.variant == "counting_for_tests"

    @staticmethod
    def penalty(layer):
        return (layer.lora_b - 2).square().sum()


@pytest.fixture(autouse=True, scope="module")
def _registered():
    ll.register(Counting)
    yield
    registry._TABLE.pop(Counting.name)


@pytest.fixture(autouse=True)
def _empty():
    Counting.seen.clear()


def small():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    handle = ll.attach(model, ll.AdapterConfig(variant="counting_for_tests"))
    return model, torch.optim.SGD(handle.parameters(), lr=0.1)


def step(model, optimizer, batches=1, clip=None):
    for i in range(batches):
        (model(torch.ones(2, 6) * (i + 1)).sum() / batches).backward()
    if clip is not None:
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
    optimizer.step()
    optimizer.zero_grad()


def test_driven_by_the_optimiser_also_under_accumulation_and_clipping():
    model, optimizer = small()
    ll.schedule(model, optimizer, total_steps=7)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # wraps optimizer.step
    for _ in range(3):
        step(model, optimizer, batches=4, clip=0.5)
    assert [s[:3] for s in Counting.seen] == [(p, n, 7) for n in (1, 2, 3) for p in "01"]
    total = sum(float(g.square().sum()) for *_, g in Counting.seen[:2])
    assert total == pytest.approx(0.25)  # the gradients of the step itself, after clipping
    assert model[0].lora_n == 3


def test_never_stepping_raises_at_the_second_training_forward_and_at_save(tmp_path):
    model, optimizer = small()
    model(torch.ones(2, 6))
    with pytest.raises(StateError, match=r"ll\.schedule\(model, optimizer, total_steps\)"):
        model(torch.ones(2, 6))
    with pytest.raises(StateError, match="trained without its schedule"):
        ll.save(model, tmp_path / "x")
    model.eval()
    model(torch.ones(2, 6))
    with torch.no_grad():
        model.train()(torch.ones(2, 6))
    ll.schedule(model, optimizer, 3)
    step(model, optimizer)
    step(model, optimizer)
    ll.save(model, tmp_path / "x")
    ll.activate(model, None)
    model(torch.ones(2, 6))


def test_it_goes_on_after_save_and_load(tmp_path):
    model, optimizer = small()
    ll.schedule(model, optimizer, 5)
    for _ in range(2):
        step(model, optimizer)
    ll.save(model, tmp_path / "x")
    model, _ = small()
    ll.detach(model)
    handle = ll.load(model, tmp_path / "x.safetensors", trainable=True)
    assert handle.record.steps == 2 and handle.record.total_steps == 5 and model[1].lora_n == 2
    model(torch.ones(2, 6))
    with pytest.raises(StateError, match="again after loading"):
        model(torch.ones(2, 6))
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    ll.schedule(model, optimizer, 5)
    Counting.seen.clear()
    step(model, optimizer)
    assert [s[:3] for s in Counting.seen] == [("0", 3, 5), ("1", 3, 5)]


def test_a_second_call_replaces_the_first_and_a_copy_is_not_driven():
    model, optimizer = small()
    ll.schedule(model, optimizer, 5)
    ll.schedule(model, optimizer, 9)
    step(model, optimizer)
    assert [s[:3] for s in Counting.seen] == [("0", 1, 9), ("1", 1, 9)]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied(torch.ones(2, 6))
        with pytest.raises(StateError, match="nothing steps it"):
            copied(torch.ones(2, 6))
    step(model, optimizer)
    assert model[0].lora_n == 2


def test_two_adapters_with_an_optimiser_each():
    model, first = small()
    other = ll.attach(model, ll.AdapterConfig(variant="counting_for_tests"), name="other")
    second = torch.optim.SGD(other.parameters(), lr=0.1)
    ll.schedule(model, first, 5)
    ll.schedule(model, second, 9)
    step(model, second)
    assert other.record.steps == 1 and ll.adapters(model)["default"].record.steps == 0
    ll.rename(model, "other", "renamed")
    step(model, second)
    assert other.record.steps == 2
    ll.activate(model, "default")
    other._record.trainable = False
    step(model, first)
    assert [r.record.steps for r in ll.adapters(model).values()] == [1, 2]
    ll.detach(model, "renamed")
    second.step()


def test_the_optimiser_may_be_wrapped():
    from accelerate import Accelerator

    model, optimizer = small()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, wrapped = accelerator.prepare(model, optimizer)
    ll.schedule(model, wrapped, 5)
    for i in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 6)).sum())
            wrapped.step()
            wrapped.zero_grad()
        assert ll.adapters(model)["default"].record.steps == (i + 1) // 2


def test_refusals():
    model, optimizer = small()
    with pytest.raises(StateError, match="positive"):
        ll.schedule(model, optimizer, 0)
    with pytest.raises(StateError, match="trains no tensor of 'default'"):
        ll.schedule(model, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1), 5)
    with pytest.raises(StateError, match="str is no torch"):
        ll.schedule(model, "sgd", 5)
    with pytest.raises(StateError, match="nothing to compact"):
        ll.compact(model, rank=2)
    plain = nn.Sequential(nn.Linear(6, 5))
    ll.attach(plain, ll.LoRAConfig(r=2))
    with pytest.raises(StateError, match="no attached adapter has a schedule"):
        ll.schedule(plain, optimizer, 5)


def test_penalty_is_the_sum_over_the_targets_of_what_is_active():
    model, _ = small()
    assert ll.penalty(model) == 4 * 9
    ll.penalty(model).backward()
    assert torch.equal(model[0].lora_b.grad, torch.full((5,), -4.0))
    ll.activate(model, None)
    assert ll.penalty(model) == 0 and ll.penalty(model, "default") == 36


def test_the_penalties_of_all_active_adapters_are_added():
    model, _ = small()
    ll.attach(model, ll.AdapterConfig(variant="counting_for_tests"), name="second")
    with torch.no_grad():
        model[0]._parameters["lora_b@second"].add_(1)
    assert ll.penalty(model, "default") == 4 * 9 and ll.penalty(model, "second") == 4 * 4 + 5
    ll.activate(model, ["second", "default"])
    assert ll.penalty(model) == 36 + 21


def test_a_frozen_adapter_stands_still():
    model, _ = small()
    other = nn.Parameter(torch.zeros(1))
    handle = ll.adapters(model)["default"]
    optimizer = torch.optim.SGD([*handle.parameters(), other], lr=0.1)
    ll.schedule(model, optimizer, 5)
    handle.trainable = False
    other.grad = torch.ones(1)
    optimizer.step()
    assert handle.record.steps == 0
    handle.trainable = True
    step(model, optimizer)
    assert handle.record.steps == 1


def test_a_step_within_a_step_counts_once():
    class Outer(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model, _ = small()
    handle = ll.adapters(model)["default"]
    optimizer = Outer(handle.parameters(), lr=0.1)
    ll.schedule(model, optimizer, 5)
    step(model, optimizer)
    step(model, optimizer)
    assert handle.record.steps == 2
