"""Which variants the contract runs on (all that are registered) and with what options."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lora_lite as ll
from lora_lite import testing

OPTIONS: dict[str, dict[str, Any]] = {
    "cpt": {"epsilon": 50.0},  # the usual ball is smaller than what random tensors of the checks differ by
    "adalora": {"target_r": 2, "r": 3},  # the default budget is more than a toy rank, so that nothing would be pruned
}
"""Config fields of methods whose defaults show nothing on 12x20 layers."""
WIDTH_CHECK = "a_step_is_as_long_at_any_width"


def cases(promise: str) -> Any:
    """Parametrises a test over every check of a promise, every registered variant, fp32 and bf16, bias and none."""
    found = []
    for variant in ll.variants():
        for dtype in (torch.float32, torch.bfloat16):
            for bias in (True, False):
                case = testing.Case(variant, dtype, bias, OPTIONS.get(variant.name, {}))
                short = f"{'fp32' if dtype == torch.float32 else 'bf16'}-{'bias' if bias else 'none'}"
                for name, its in testing.PROMISES.items():
                    if its == promise and testing.applies(name, case):
                        long = name == WIDTH_CHECK and (variant.needs_weight or variant.needs_data)
                        marks = [pytest.mark.slow] if long else []  # a decomposition of 1,024 x 1,024
                        found.append(pytest.param(name, case, id=f"{variant.name}-{name}-{short}", marks=marks))
    assert found, f"no check belongs to {promise}"
    return pytest.mark.parametrize(("name", "case"), found)
