"""7. Same seed, same adapter."""

from __future__ import annotations

import itertools

import torch

from ...runtime.plan import plan
from ..case import Case
from .suite import check, full_precision, same_tensors, tensors_of


@check("7_same_seed", full_precision)
def same_seed_same_adapter(case: Case) -> None:
    """Whatever the global random state, the adapter's name, the other adapters and the chosen subset of targets;
    another for each seed, layer and tensor."""
    want = tensors_of(case.fresh())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(31337)
        case.expect(
            same_tensors(tensors_of(case.fresh()), want),
            "the start depends on the global random state; draw from layer.generator().",
        )
    model = case.random("first")
    case.attach(model, "second")
    case.expect(
        same_tensors(tensors_of(model, "second"), want), "the start depends on the adapter's name or on other adapters."
    )
    if case.variant.group_init is None and case.variant.shared_specs is None:
        part = case.model()
        case.attach(part, layers=(1,))
        got = tensors_of(part)
        case.expect(same_tensors(got, {k: want[k] for k in got}), "the start depends on which other targets there are.")
    other = tensors_of(case.fresh(seed=1))
    drawn = drawn_tensors(case)
    for key in drawn:
        case.expect(not torch.equal(other[key], want[key]), f"{key}: another seed gives the same start.")
    for key, twin in itertools.combinations(drawn, 2):
        if want[key].shape == want[twin].shape:
            case.expect(not torch.equal(want[key], want[twin]), f"{key} and {twin} draw the same start.")


def drawn_tensors(case: Case) -> list[str]:
    """Keys of the tensors whose spec draws random numbers, and whose start nothing rewrites."""
    if case.variant.init is not None or case.variant.group_init is not None:
        return []
    targets = plan(case.model(), case.cfg()).targets
    return [
        f"{t.path}.{short}"
        for t in targets
        for short, spec in t.specs.items()
        if str(spec.init).partition(":")[0] in ("kaiming", "normal")
    ]
