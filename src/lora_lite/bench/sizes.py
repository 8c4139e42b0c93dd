"""A method at a given number of trained parameters: the change of its size that comes nearest."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import nn

import lora_lite as ll

NEAR = 0.15
"""How far from the wanted number a size may lie."""
VALUES = (*range(1, 33), 40, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024, 2048)
OTHER = ("seed", "layers", "max_rank")
"""Whole numbers of a config that are no size."""


def fields_for(model: nn.Module, method: str, wanted: int, fixed: dict[str, Any]) -> dict[str, Any] | None:
    """Changes of the config with which `method` trains about `wanted` parameters of `model`, the fields that a task
    fixes among them; none where its default size lies within 15 % already, and None where no value of any one field
    comes so near."""
    with contextlib.suppress(ll.LoraLiteError):  # a default that does not fit may have another size that does
        if near(ll.plan(model, ll.get_variant(method).config(variant=method, **fixed)).trainable, wanted):
            return {}
    found = [(abs(n - wanted), changes) for changes, n in _sizes(model, method, fixed) if near(n, wanted)]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def near(trained: float, wanted: int) -> bool:
    """Whether a size counts as the wanted one."""
    return abs(trained - wanted) < NEAR * wanted


def _sizes(model: nn.Module, method: str, fixed: dict[str, Any]) -> Iterator[tuple[dict[str, Any], int]]:
    """(changes, trained parameters) for every value of every whole number of the config that it accepts."""
    variant = ll.get_variant(method)
    default = variant.config(variant=method, **fixed)
    for field in dataclasses.fields(default):
        now = getattr(default, field.name)
        if field.name in OTHER or field.name in fixed or isinstance(now, bool) or not isinstance(now, int):
            continue
        for value in VALUES:
            try:
                plan = ll.plan(model, dataclasses.replace(default, **{field.name: value}))
            except ll.LoraLiteError:
                continue  # a value that does not divide, or lies above the width
            yield {field.name: value}, plan.trainable
