"""1. The base is read-only."""

from __future__ import annotations

import torch

from ...runtime.commit import detach
from ...runtime.merge import merge, unmerge
from ...runtime.select import activate
from ..case import Case, randomise, run, train
from ..toy import Snapshot
from .suite import affine, check


@check("1_base_read_only")
def base_survives_a_life_cycle(case: Case) -> None:
    """attach, train, select, save, detach: the base is bit for bit as before, and nothing stays behind."""
    model, x = case.model(), case.x()
    before = Snapshot(model, x)
    bits = {n: p.detach().clone() for n, p in model.named_parameters()}
    case.attach(model)
    if case.variant.trains:
        train(case, model, steps=2)
    randomise(model)
    run(model, x)
    for n, p in bits.items():
        case.expect(
            torch.equal(model.get_parameter(n), p), f"the base parameter {n} changed while the adapter was attached."
        )
        case.expect(not model.get_parameter(n).requires_grad, f"the base parameter {n} still requires a gradient.")
    activate(model, None)
    case.expect(
        torch.equal(run(model, x), before.output[0]), "with no active adapter the output is not the base's bits."
    )
    detach(model)
    before.rng = torch.get_rng_state()  # training and torch.optim may draw; attach alone is checked below
    case.expect(not (d := before.difference(model)), f"after detach {d}.")


@check("1_base_read_only", affine)
def unmerge_gives_the_bits_back(case: Case) -> None:
    """20 cycles of merge and unmerge."""
    model, x = case.random(), case.x()
    before = Snapshot(model, x)
    for _ in range(20):
        merge(model)
        unmerge(model)
    case.expect(not (d := before.difference(model)), f"after 20 merge/unmerge cycles {d}.")
