"""2. Identity at the start."""

from __future__ import annotations

import torch

from ..case import Case, run
from .suite import check, effect, relative, trains


@check("2_identity")
def fresh_adapter_is_the_identity(case: Case) -> None:
    """Bit for bit, for inputs of 2, 3 and 4 dimensions, training or not; or within the declared bound in fp32."""
    variant = case.variant
    bound = variant.identity_bound
    case.expect(bound >= 0, f"identity_bound is {bound}: 0, a relative departure, or math.inf.")
    for shape in ((5,), (3, 5), (2, 3, 4)):
        x = case.x(*shape)
        base = run(case.model(), x)
        model = case.fresh(dropout=0.1)
        for mode in (False, True):
            y = run(model.train(mode), x)
            case.expect(
                y.shape == base.shape and y.dtype == base.dtype,
                f"an input {tuple(x.shape)} gives {tuple(y.shape)} {y.dtype}, not {tuple(base.shape)} {base.dtype}.",
            )
            if variant.exact_identity:
                case.expect(
                    torch.equal(y, base),
                    f"a fresh adapter changes the output by {relative(y, base):.1e} (training={mode}, input "
                    f"{tuple(x.shape)}); train the deviation from the identity, or declare identity_bound.",
                )
            elif case.dtype == torch.float32:
                case.expect(
                    relative(y, base) <= bound,
                    f"a fresh adapter departs by {relative(y, base):.1e}, more than the declared {bound:.1e}.",
                )
            case.expect(torch.isfinite(y).all(), "a fresh adapter gives values that are not finite.")


@check("2_identity", lambda case: trains(case))
def random_adapter_does_something(case: Case) -> None:
    """Otherwise every other check would be empty."""
    x = case.x()
    case.expect(
        (e := effect(case, case.random(), x)) > 1e-2, f"random trained tensors change the output by only {e:.1e}."
    )
