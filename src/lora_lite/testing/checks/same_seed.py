"""7. Same seed, same adapter."""

from __future__ import annotations

import torch

from ..case import Case
from .suite import check, full_precision, same_tensors, tensors_of


@check("7_same_seed", full_precision)
def same_seed_same_adapter(case: Case) -> None:
    """Whatever the global random state, the adapter's name, the other adapters and the chosen subset of targets."""
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
    case.expect(
        not same_tensors(tensors_of(case.fresh(seed=1)), want) or not draws(case), "another seed gives the same start."
    )


def draws(case: Case) -> bool:
    """Whether a spec draws random numbers (then seeds must matter)."""
    from ...runtime.plan import plan

    targets = plan(case.model(), case.cfg()).targets
    return any(
        s.init in ("kaiming", "normal") or str(s.init).startswith("normal:") for t in targets for s in t.specs.values()
    )
