"""Random starts: every layer, tensor, expert and adapter draws numbers of its own."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.core import registry
from lora_lite.testing.abilities import Experts
from lora_lite.testing.toy import toy


@pytest.fixture
def two_draws(monkeypatch):
    """A method with two tensors of one shape and start."""
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))

    @ll.register
    class TwoDraws(ll.Variant):
        name = "two_draws"

        @staticmethod
        def param_specs(d_in, d_out, cfg):
            return {f"lora_{k}": ll.ParamSpec((cfg.r, d_in), init="normal") for k in "ab"}

        @staticmethod
        def forward(layer, x, y):
            return y + (x @ (layer.lora_a - layer.lora_b).mT).sum(-1, keepdim=True)


def all_differ(tensors):
    return all(not torch.equal(a, b) for a, b in itertools.combinations(tensors, 2))


@pytest.mark.usefixtures("two_draws")
def test_layers_and_tensors():
    model = toy()
    ll.attach(model, ll.AdapterConfig(variant="two_draws", r=3, target_names=("up",)))
    drawn = list(ll.adapter_state_dict(model).values())
    assert len(drawn) == 4 and all_differ(drawn)


def test_experts():
    model = nn.Sequential(Experts())
    ll.attach(model, ll.LoRAConfig(r=3, target_kinds=("experts",), target_names=("up_proj",)))
    (A,) = (t for k, t in ll.adapter_state_dict(model).items() if k.endswith("lora_A"))
    assert A.shape[0] == 3 and all_differ(A)


def test_randomised_decompositions_draw_from_the_seed():
    """Without rounds of iteration the result shows what was drawn."""
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(60, 50))
        ll.attach(model, ll.PiSSAConfig(r=2, svd="randomised", niter=0, seed=seed))
        found.append(model[0].lora_A0)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_what_dare_drops():
    """Two layers and two adapters with the same factors: equal updates, dropped differently."""
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)).double()
    for name in ("a", "b"):
        ll.attach(model, ll.LoRAConfig(r=3, alpha=7, dtype="float64"), name=name)
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 12, generator=g), torch.randn(12, 3, generator=g)
    for n, p in model.named_parameters():
        if "lora_" in n:
            p.data.copy_(A if "lora_A" in n else B)

    def update(names, seed=0):
        ll.combine(model, dict.fromkeys(names, 1.0), name="new", method="dare", rank=12, density=0.4, seed=seed)
        found = [layer._parameters["lora_B@new"] @ layer._parameters["lora_A@new"] for layer in model]
        ll.detach(model, "new")
        return found

    assert all_differ(update("a")) and all_differ([update("a")[0], update("a", seed=1)[0]])
    torch.testing.assert_close(update("a")[0], update("a")[0])
    both = update("ab")[0]  # where both adapters drop the same entries, the sum is twice one of them
    kept = (both.abs() > 1e-9).double().mean()
    assert abs(float(kept) - (1 - 0.6**2)) < 0.12, "of 144 entries the share that at least one of the two keeps"
