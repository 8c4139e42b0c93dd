"""The written backward passes of low-rank updates and gains against finite differences, in fp64."""

from __future__ import annotations

import pytest
import torch

from lora_lite.ops import lowrank
from lora_lite.ops.lowrank import add_lowrank, lowrank_update, scale_outputs, scaled_lowrank_update


@pytest.fixture(autouse=True, params=[2**14, 0], ids=["few numbers", "many"])
def _both_ways(monkeypatch, request):
    monkeypatch.setattr(lowrank, "FEW", request.param)


def test_few_numbers_are_left_to_torch(monkeypatch):
    """Whose backward passes Python does not see."""
    ways = []
    monkeypatch.setattr(lowrank._AddLowrank, "apply", lambda y, z, B, s: ways.append("own") or torch.addmm(y, z, B.mT))
    y, x, A, B = draw((3, 7), (3, 5), (2, 5), (7, 2))
    lowrank_update(y, x, A, B)
    assert ways == ([] if lowrank.FEW else ["own"])


def draw(*shapes):
    g = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]


def test_low_rank_update():
    y, x, A, B = draw((2, 3, 7), (2, 3, 5), (2, 5), (7, 2))
    torch.autograd.gradcheck(lambda *t: lowrank_update(*t, 1.7), (y, x, A, B))
    torch.testing.assert_close(lowrank_update(y, x, A, B, 1.7), y + 1.7 * x @ A.mT @ B.mT)


def test_the_second_factor_alone():
    y, z, B = draw((4, 7), (4, 2), (7, 2))
    torch.autograd.gradcheck(lambda *t: add_lowrank(*t, -0.6), (y, z, B))


@pytest.mark.parametrize("bias", [True, False])
def test_gains_leave_the_bias_alone(bias):
    y, h, b = draw((2, 3, 7), (7,), (7,))
    b = b.detach() if bias else None
    torch.autograd.gradcheck(lambda y, h: scale_outputs(y, h, b), (y, h))
    torch.testing.assert_close(scale_outputs(y, h, b), y + h * (y - (0 if b is None else b)))


def test_gain_and_update_together():
    y, x, A, B, h, b = draw((2, 3, 7), (2, 3, 5), (2, 5), (7, 2), (7,), (7,))
    b = b.detach()
    torch.autograd.gradcheck(lambda y, x, A, B, h: scaled_lowrank_update(y, x, A, B, h, b, 1.7), (y, x, A, B, h))


@pytest.mark.parametrize("trained", ["z", "B"])
def test_what_waits_for_the_backward_pass(trained):
    """The other factor, and nothing for the one that is frozen: z is as long as the text."""
    y, z, B = draw((4, 7), (4, 2), (7, 2))
    kept = []
    frozen = {"z": B, "B": z}[trained].detach()
    z, B = (z, frozen) if trained == "z" else (frozen, B)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        add_lowrank(y, z, B)
    assert [sorted(shape) for shape in kept] == [sorted(frozen.shape)]
