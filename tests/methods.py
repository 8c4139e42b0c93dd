"""Tests over every registered method, one case each: fp32, with bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lora_lite as ll
from lora_lite import testing
from samples import OPTIONS

OF_EACH_KIND = ("lora", "dora", "ia3", "hra", "pissa", "adalora", "road", "whole", "loreft", "caa")
"""Factors, a norm, gains, a rewritten input, a start from the weight, a schedule, a rotation of outputs, a dense
change, positions, a method that is fitted."""


def every_method(
    on: Callable[[testing.Case], bool] = lambda case: True,
    *,
    quick: tuple[str, ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Parametrises `case` over the registered methods that `on` accepts.

    Args:
        quick: those that run in the quick suite; None means all.
    """
    found = []
    for variant in ll.variants():
        case = testing.Case(variant, dtype, True, dict(OPTIONS.get(variant.name, {})))
        if on(case):
            slow = quick is not None and variant.name not in quick
            found.append(pytest.param(case, id=variant.name, marks=[pytest.mark.slow] * slow))
    assert len(found) > 1
    return pytest.mark.parametrize("case", found)


def trains(case: testing.Case) -> bool:
    return case.variant.trains


def merges(case: testing.Case) -> bool:
    return case.affine


def plain(case: testing.Case) -> bool:
    """Trained without a schedule that somebody has to drive."""
    return case.variant.trains and case.variant.on_step is None
