"""B10. A resumed run that starts anew: 4 + 4 steps are 8 steps, bit for bit, and a second attach raises."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from lora_lite.testing.toy import batches
from methods import OF_EACH_KIND, every_method, trains

STEPS = 8


def steps(model, opt, n, data):
    for _ in range(n):
        batch = next(data)
        opt.zero_grad()
        model(**batch).loss.backward()
        opt.step()


def optimiser(case, model):
    handle = ll.adapters(model)["default"]
    opt = torch.optim.AdamW(handle.param_groups(lr=1e-2))
    if case.variant.on_step is not None:
        ll.schedule(model, opt, STEPS)
    return opt


@every_method(trains, quick=OF_EACH_KIND)
def test_half_and_half_is_the_whole(case, tmp_path):
    dropout = {} if "dropout" in case.variant.ignores else {"dropout": 0.2}  # which draws from the random state
    whole = case.fresh(**dropout).train()
    torch.manual_seed(5)
    steps(whole, optimiser(case, whole), STEPS, iter(batches(n=STEPS)))

    first, data = case.fresh(**dropout).train(), iter(batches(n=STEPS))
    torch.manual_seed(5)
    opt = optimiser(case, first)
    steps(first, opt, STEPS // 2, data)
    path = ll.save(first, tmp_path / "half")
    torch.save({"optimiser": opt.state_dict(), "random": torch.get_rng_state()}, tmp_path / "rest.pt")
    del first, opt
    torch.manual_seed(99)

    second = case.model().train()
    ll.load(second, path, trainable=True)
    opt = optimiser(case, second)
    rest = torch.load(tmp_path / "rest.pt", weights_only=True)
    opt.load_state_dict(rest["optimiser"])
    torch.set_rng_state(rest["random"])
    steps(second, opt, STEPS // 2, data)
    want, got = ll.adapter_state_dict(whole), ll.adapter_state_dict(second)
    assert want.keys() == got.keys()
    assert not [k for k in want if not torch.equal(want[k], got[k])]


@every_method()
def test_attaching_again_raises(case):
    model = case.random()
    want = ll.adapter_state_dict(model)
    with pytest.raises(ll.StateError, match="default"):
        case.attach(model)
    got = ll.adapter_state_dict(model)
    assert all(torch.equal(want[k], got[k]) for k in want)
