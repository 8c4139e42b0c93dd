"""Gates, reflections and rotations: the same numbers in PEFT give the same outputs and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from equations.helpers import randomise

pytestmark = pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias:UserWarning")
NAMES = ["fc1", "fc2"]
Pairs = dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]]
"""PEFT's parameter -> (our tensor, PEFT's parameter made from it)."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 8, bias=False)
        self.config = type("C", (), {"to_dict": lambda self: {}, "model_type": "net"})()

    def forward(self, x: Tensor, **_) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


def gate(layer: nn.Module) -> Pairs:
    shape = (1, -1) if layer.lora_g.numel() == layer.in_features and layer.in_features == 24 else (-1, 1)
    return {"ia3_l": (layer.lora_g, lambda g: (1 + g).view(shape))}


def bias(layer: nn.Module) -> Pairs:
    return {"beft_bias": (layer.lora_b, lambda b: b[None])}


def reflections(layer: nn.Module) -> Pairs:
    return {"hra_u": (layer.lora_U, lambda U: (layer.lora_U0.repeat_interleave(2, 0) + U).mT)}


def skew(theta: Tensor, b: int) -> Tensor:
    Q = torch.stack([torch.zeros(b, b).index_put(tuple(torch.triu_indices(b, b, 1)), t) for t in theta])
    return Q - Q.mT


def turns(sign: int) -> Callable[[nn.Module], Pairs]:
    return lambda layer: {"oft_R.weight": (layer.lora_Q, lambda q: sign * q)}


def butterfly(layer: nn.Module) -> Pairs:
    # Q = -(X - Xᵀ)/2 at m = 1, all that PEFT does without its CUDA extension
    return {
        "boft_R": (layer.lora_Q1, lambda q: -skew(q, 4)[None]),
        "boft_s": (layer.lora_s, lambda s: 1 + s[:, None]),
    }


def rotary(k: int) -> Callable[[nn.Module], Pairs]:
    def by_position(t: Tensor) -> Tensor:
        """(k, d/2) in the order of the pairs -> PEFT's order, for groups of 8."""
        g = t.view(k, -1, 4)
        if k < 4:
            return g.transpose(0, 1).flatten()
        first, second = (
            torch.cat((g[0], g[3]), -1),
            torch.cat((g[1], g[2]), -1),
        )  # PEFT: cosines of all outputs, then sines
        return torch.stack((first, second), 1).flatten()

    return lambda layer: {
        "road_theta": (layer.lora_theta, by_position),
        "road_alpha": (layer.lora_alpha, lambda a: 1 + by_position(a)),
    }


OFT = {"oft_block_size": 8, "r": 0}
CASES: dict[str, tuple[ll.AdapterConfig, peft.PeftConfig, Callable[[nn.Module], Pairs], float]] = {
    "ia3": (ll.IA3Config(), peft.IA3Config(target_modules=NAMES, feedforward_modules=[]), gate, 0.5),
    "ia3 input": (
        ll.IA3Config(input_names=("fc2",)),
        peft.IA3Config(target_modules=NAMES, feedforward_modules=["fc2"]),
        gate,
        0.5,
    ),
    "bitfit": (ll.BitFitConfig(), peft.BeftConfig(target_modules=NAMES), bias, 0.5),
    "hra": (ll.HRAConfig(r=6), peft.HRAConfig(target_modules=NAMES, r=6), reflections, 0.1),
    # PEFT's exact map is the inverse of its series, which is the default there: see docs/differences-from-peft.md
    "oft exact": (
        ll.OFTConfig(block_size=8),
        peft.OFTConfig(target_modules=NAMES, use_cayley_neumann=False, **OFT),
        turns(-1),
        0.3,
    ),
    "oft series": (
        ll.OFTConfig(block_size=8, neumann_terms=5),
        peft.OFTConfig(target_modules=NAMES, use_cayley_neumann=True, num_cayley_neumann_terms=5, **OFT),
        turns(1),
        0.1,
    ),
    "boft": (ll.BOFTConfig(n_factors=1), peft.BOFTConfig(target_modules=NAMES, boft_block_size=4), butterfly, 0.3),
    **{
        f"road {k}": (
            ll.RoadConfig(per_pair=k, group_size=8),
            peft.RoadConfig(target_modules=NAMES, variant=f"road_{k}", group_size=8),
            rotary(k),
            0.5,
        )
        for k in (1, 2, 4)
    },
}


def theirs_and_ours(case: str) -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]]:
    cfg, peft_cfg, pairs, size = CASES[case]
    ours = Net()
    theirs = peft.get_peft_model(copy.deepcopy(ours), peft_cfg)
    ll.attach(ours, cfg)
    randomise(ours, size)
    found = []
    for name in NAMES:
        layer = theirs.base_model.model.get_submodule(name)
        for key, (own, convert) in pairs(ours.get_submodule(name)).items():
            key, _, tail = key.partition(".")
            other = getattr(layer, key)["default"]
            other = getattr(other, tail) if tail else other
            with torch.no_grad():
                other.copy_(convert(own).view_as(other))
            found.append((own, other, convert))
    return theirs, ours, found


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case, monkeypatch):
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", False)  # do not try to compile the extension
    theirs, ours, found = theirs_and_ours(case)
    x = torch.randn(3, 7, 16)
    mine, other = ours(x), theirs(x)
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
    with ll.active(ours, None):
        assert bool((ours(x) - mine).abs().max() > 1e-2)
    mine.square().sum().backward()
    other.square().sum().backward()
    for own, parameter, convert in found:
        # the chain rule through the conversion
        want = torch.autograd.functional.vjp(convert, own.detach(), parameter.grad.view_as(convert(own)))[1]
        torch.testing.assert_close(own.grad, want, atol=1e-4, rtol=1e-4)


def test_a_bounded_rotation_acts_as_their_projected_one():
    """PEFT shortens the parameter itself in forward; here it acts as if shortened. The bound there is per √(number of
    blocks)."""
    ours = Net()
    theirs = peft.get_peft_model(
        copy.deepcopy(ours), peft.OFTConfig(target_modules=["fc1"], use_cayley_neumann=False, coft=True, eps=0.4, **OFT)
    )
    ll.attach(ours, ll.OFTConfig(target_names=("fc1",), block_size=8, max_norm=0.4 / 2**0.5))
    randomise(ours)
    weight = theirs.base_model.model.fc1.oft_R["default"].weight
    weight.data.copy_(-ours.fc1.lora_Q)
    x = torch.randn(3, 16)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)
    assert not torch.equal(weight, -ours.fc1.lora_Q)
