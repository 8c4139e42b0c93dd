"""The contract as a test that anybody can run on a variant of their own: `ll.testing.check_variant("myvariant")`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..core.registry import get_variant, variants
from ..core.variant import Variant
from .abilities import ABILITIES as ABILITIES
from .abilities import Outcome as Outcome
from .abilities import outcome as outcome
from .abilities import what_works as what_works
from .case import Case as Case
from .checks.suite import CHECKS as CHECKS
from .checks.suite import PROMISES as PROMISES
from .checks.suite import applies as applies
from .toy import batches as batches
from .toy import toy as toy

__all__ = [
    "check_variant",
    "run_check",
    "CHECKS",
    "PROMISES",
    "applies",
    "what_works",
    "ABILITIES",
    "outcome",
    "Outcome",
    "Case",
    "batches",
    "toy",
]


def check_variant(
    variant: str | type[Variant],
    *,
    checks: Iterable[str] | None = None,
    calibration_data: Callable[[torch.dtype], Any] = batches,
    **options: Any,
) -> list[str]:
    """Run the contract suite on a registered variant: on 12x20 layers, in fp32 and bf16, with bias and without.

    Args:
        variant: its name, or its class.
        checks: names of some checks (`ll.testing.CHECKS` lists them); None runs all.
        calibration_data: `dtype -> data`, for a method that reads other data than labelled batches of vectors.
        **options: config fields for every attach; by default r=3 and alpha=7, or the next size that the method takes.

    Returns:
        The names of the checks that ran.

    Raises:
        AssertionError: a promise is broken; the message says which and how.
    """
    found = get_variant(variant) if isinstance(variant, str) else variant
    if found not in variants():
        raise AssertionError(
            f"{getattr(found, '__name__', found)} is not registered: write @lora_lite.register above the class."
        )
    ran: dict[str, None] = {}
    for name in CHECKS if checks is None else checks:
        for dtype in (torch.float32, torch.bfloat16):
            for bias in (True, False):
                if run_check(name, Case(found, dtype, bias, dict(options), calibration_data)):
                    ran[name] = None
    return list(ran)


def run_check(name: str, case: Case) -> bool:
    """One check on one case; False where it has nothing to say. Any other error becomes an AssertionError that names
    the check."""
    if not applies(name, case):
        return False
    try:
        CHECKS[name](case)
    except AssertionError as e:
        raise AssertionError(f"{e} [{name}]") from e.__cause__
    except Exception as e:
        raise AssertionError(f"{case}: {name} raised {type(e).__name__}: {e}") from e
    return True
