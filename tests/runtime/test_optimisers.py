"""What the optimiser is told: parameter groups, and Riemannian preconditioning."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.core.errors import StateError


def small(cfg=None, data=None):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 13, bias=False)).double()
    handle = ll.attach(model, cfg or ll.LoRAConfig(r=3, alpha=7, dtype="float64"), data)
    for p in handle.parameters():
        nn.init.normal_(p)
    return model, handle


def update(model):
    layer = model[0]
    return layer.lora_B @ layer.lora_A


def backward(model):
    model(torch.linspace(-1, 1, 80).double().reshape(4, 20)).square().sum().backward()


def test_groups_of_lora_plus():
    model, handle = small(ll.LoRAConfig(r=3, lr_ratio_B=16))
    groups = handle.param_groups(lr=1e-3, weight_decay=0.1)
    by_id = {id(p): g for g in groups for p in g["params"]}
    for i in (0, 2):
        a, b = by_id[id(model[i].lora_A)], by_id[id(model[i].lora_B)]
        assert (a["lr"], b["lr"]) == (1e-3, pytest.approx(16e-3))
        assert a["weight_decay"] == b["weight_decay"] == 0.1
    optimizer = torch.optim.SGD(groups)
    before = copy.deepcopy(model)
    backward(model)
    optimizer.step()
    ratio = (model[0].lora_B - before[0].lora_B) / (-1e-3 * model[0].lora_B.grad - 1e-4 * before[0].lora_B)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 16), atol=1e-2, rtol=1e-3)


def test_gains_get_no_weight_decay_and_every_parameter_is_there_once():
    model, handle = small(ll.AdaLoRAConfig(r=3, target_r=2))
    groups = handle.param_groups(lr=1e-3, weight_decay=0.1)
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert {decay[id(model[i].lora_E)] for i in (0, 2)} == {0.0}
    assert {decay[id(model[i].lora_A)] for i in (0, 2)} == {0.1}
    assert sorted(decay) == sorted(id(p) for p in handle.parameters())
    assert sum(len(g["params"]) for g in groups) == len(decay)


def test_the_magnitude_of_dora_is_not_pulled_to_nothing():
    model, handle = small(ll.DoRAConfig(r=3, alpha=7))
    groups = handle.param_groups(lr=1e-3, weight_decay=0.1)
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert decay[id(model[0].lora_m)] == 0.0 and decay[id(model[0].lora_B)] == 0.1


@pytest.mark.parametrize("config", [ll.LoRAConfig, ll.CorDAConfig])
def test_preconditioned_gradients(config):
    data = [torch.randn(60, 20).double()] if config is ll.CorDAConfig else None
    model, handle = small(config(r=3, alpha=7, dtype="float64"), data)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    ll.precondition(model, optimizer, reg=1e-3)
    for m in (model, plain):
        backward(m)
    optimizer.step()
    eye = 1e-3 * torch.eye(3).double()
    for i in (0, 2):
        a, b = plain[i].lora_A, plain[i].lora_B
        A = a + (plain[i].lora_A0 if config is ll.CorDAConfig else 0)
        B = b + (plain[i].lora_B0 if config is ll.CorDAConfig else 0)
        torch.testing.assert_close(model[i].lora_A, a - 0.1 * torch.linalg.inv(B.mT @ B + eye) @ a.grad)
        torch.testing.assert_close(model[i].lora_B, b - 0.1 * b.grad @ torch.linalg.inv(A @ A.mT + eye))


@pytest.mark.parametrize("preconditioned", [True, False])
def test_the_step_does_not_depend_on_how_the_update_is_split(preconditioned):
    steps = []
    mix = torch.tensor([[3.0, 1, 0], [0, 0.2, 0], [1, 0, 5]]).double()
    for M in (torch.eye(3).double(), mix):
        model, handle = small()
        with torch.no_grad():  # the same product from other factors
            for i in (0, 2):
                model[i].lora_A.copy_(torch.linalg.inv(M) @ model[i].lora_A)
                model[i].lora_B.copy_(model[i].lora_B @ M)
        optimizer = torch.optim.SGD(handle.parameters(), lr=1e-6)
        if preconditioned:
            ll.precondition(model, optimizer, reg=1e-12)
        before = update(model).detach()
        backward(model)
        optimizer.step()
        steps.append((update(model).detach() - before) / 1e-6)
    error = float((steps[0] - steps[1]).norm() / steps[0].norm())
    assert error < 1e-4 if preconditioned else error > 0.1


def test_once_per_step_removable_and_only_where_there_are_factors():
    class Sub(torch.optim.SGD):  # torch runs step hooks for it and again for its super().step()
        def step(self, closure=None):
            return super().step(closure)

    found = []
    for cls in (torch.optim.SGD, Sub):
        model, handle = small()
        optimizer = cls(handle.parameters(), lr=0.1)
        ll.precondition(model, optimizer)
        backward(model)
        optimizer.step()
        found.append(model[0].lora_A.detach().clone())
    assert torch.equal(*found)
    model, handle = small()
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    ll.precondition(model, optimizer).remove()
    backward(model)
    before = model[0].lora_A.detach() - 0.1 * model[0].lora_A.grad
    optimizer.step()
    torch.testing.assert_close(model[0].lora_A.detach(), before)
    with pytest.raises(StateError, match="reg must be positive"):
        ll.precondition(model, optimizer, reg=0)
    with pytest.raises(StateError, match="no adapter is called"):
        ll.precondition(model, optimizer, name="x")
    ll.precondition(model, optimizer)
    ll.detach(model)
    optimizer.step()
    with pytest.raises(StateError, match="no adapter"):
        ll.precondition(model, optimizer)


def test_fresh_lora_trains_when_preconditioned():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12))
    handle = ll.attach(model, ll.LoRAConfig(r=4))
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    ll.precondition(model, optimizer)
    x, target = torch.randn(32, 20), torch.randn(32, 12)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
