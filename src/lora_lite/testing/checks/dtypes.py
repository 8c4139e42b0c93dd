"""6. Dtypes."""

from __future__ import annotations

import copy

import torch

from ...runtime.handle import adapters
from ...runtime.model.site import owned_tensors
from ...runtime.model.state import record_of
from ...runtime.select import active
from ..case import Case, run
from .suite import check, full_precision, relative


@check("6_dtypes")
def adapter_is_fp32_and_output_keeps_its_dtype(case: Case) -> None:
    model, x = case.random(), case.x()
    for target, short, _, t in owned_tensors(model, record_of(model)):
        case.expect(t.dim() > 0, f"{target.path}.{short} has no dimension; sharded training refuses such parameters.")
        if target.specs[short].dtype is None:
            case.expect(t.dtype == torch.float32, f"{target.path}.{short} is stored as {t.dtype}, not float32.")
    case.expect(run(model, x).dtype == case.dtype, f"the output is {run(model, x).dtype}, the base's is {case.dtype}.")


@check("6_dtypes", full_precision)
def autocast_is_honoured(case: Case) -> None:
    """Under autocast the output has the dtype that the bare layer has there, and gradients arrive in fp32."""
    model, x = case.random(), case.x()
    y = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        with active(model, None):
            base = model(x)
        low = model(x)
    case.expect(low.dtype == base.dtype, f"under autocast the output is {low.dtype}, the bare model's {base.dtype}.")
    case.expect(relative(low, y) < 0.15, f"under autocast the output moves by {relative(low, y):.1e}.")
    if case.variant.trains:
        with torch.autocast("cpu", torch.bfloat16):  # of what is drawn in training, nothing else hears
            low = model.train(case.variant.noisy)(x)
        low.float().square().sum().backward()
        grads = [p.grad for p in adapters(model)["default"].parameters()]
        case.expect(
            all(g is not None and g.dtype == torch.float32 and bool(g.isfinite().all()) for g in grads),
            "under autocast a gradient is missing, not fp32 or not finite.",
        )


@check("6_dtypes", lambda case: case.dtype == torch.bfloat16)
def low_precision_agrees_with_high(case: Case) -> None:
    """bf16 base and adapter against the same numbers in fp64."""
    model, x = case.random(), case.x()
    exact = copy.deepcopy(model).double()
    error = relative(run(model, x), run(exact, x.double()))
    case.expect(error < 0.05, f"bf16 departs from fp64 by {error:.1e} of the largest output.")


@check("6_dtypes", full_precision)
def low_precision_storage(case: Case) -> None:
    """dtype="bfloat16" in the config stores bf16 and still works."""
    model = case.random(dtype="bfloat16")
    for target, short, _, t in owned_tensors(model, record_of(model)):
        case.expect(
            target.specs[short].dtype is not None or t.dtype == torch.bfloat16,
            f"{target.path}.{short} is {t.dtype} although the config says bfloat16.",
        )
    case.expect(run(model, case.x()).isfinite().all(), "bf16 adapter tensors give values that are not finite.")
