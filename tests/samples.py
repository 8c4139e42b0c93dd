"""Which variants the contract runs on (all that are registered) and with what options."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import lora_lite as ll
from lora_lite import testing

OPTIONS: dict[str, dict[str, Any]] = {
    "arrow": {"top": 9, "temperature": 500.0},  # random keys are long, and a sharp choice turns on rounding
    "cpt": {"epsilon": 50.0},  # the usual ball is smaller than what random tensors of the checks differ by
    "adalora": {"target_r": 2, "r": 3},  # the default budget is more than a toy rank, so that nothing would be pruned
}
"""Config fields of methods whose defaults show nothing on 12x20 layers."""
NUMBERS = ("2_identity", "5_merge", "6_dtypes", "tensors")
"""Promises that may hold in one dtype and not in another."""
WIDTH_CHECK = "a_step_is_as_long_at_any_width"


def cases(promise: str, only: tuple[str, ...] | None = None) -> Any:
    """Parametrises a test over every check of a promise, every registered variant, fp32 and bf16, bias and none.

    Quick are fp32 with a bias and, for the promises about numbers, bf16 without, where a check applies to them; the
    other combinations are slow.

    Args:
        only: the methods whose cases are quick; None means all.
    """
    found = []
    for variant in ll.variants():
        fitting: dict[str, list[testing.Case]] = {}
        for dtype, bias in itertools.product((torch.float32, torch.bfloat16), (True, False)):
            case = testing.Case(variant, dtype, bias, OPTIONS.get(variant.name, {}))
            for name, its in testing.PROMISES.items():
                if its == promise and testing.applies(name, case):
                    fitting.setdefault(name, []).append(case)
        for name, all_of_it in fitting.items():
            quick = [case for case in all_of_it if case.bias == (case.dtype == torch.float32)] or all_of_it
            if promise not in NUMBERS:
                quick = [case for case in quick if case.dtype == torch.float32] or quick
            long = name == WIDTH_CHECK and (variant.needs_weight or variant.needs_data)
            long = long or (only is not None and variant.name not in only)
            for case in all_of_it:
                short = f"{'fp32' if case.dtype == torch.float32 else 'bf16'}-{'bias' if case.bias else 'none'}"
                # long: a decomposition of 1,024 x 1,024
                marks = [pytest.mark.slow] if long or case not in quick else []
                found.append(pytest.param(name, case, id=f"{variant.name}-{name}-{short}", marks=marks))
    assert found, f"no check belongs to {promise}"
    return pytest.mark.parametrize(("name", "case"), found)
