"""What methods with tensors shared by several layers have in common: frozen random bases, and which layers are of one
sort."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from torch import Generator, Tensor

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def uniform(bound: float) -> Callable[[Tensor, Generator], object]:
    """U(±bound)."""
    return lambda t, g: t.uniform_(-bound, bound, generator=g)


def kaiming_relu(t: Tensor, g: Generator) -> None:
    """U(±√(6/fan_in)), fan_in = the last dimension: unit second moments behind a ReLU, as PEFT draws frozen bases."""
    bound = (6 / t.shape[-1]) ** 0.5
    t.uniform_(-bound, bound, generator=g)


def groups(targets: Iterable[Any], key: Callable[[Any], Hashable]) -> list[list[Any]]:
    """The targets in lists of equal keys, in their order."""
    found: dict[Hashable, list[Any]] = {}
    for target in targets:
        found.setdefault(key(target), []).append(target)
    return list(found.values())


def sort_of(target: Any) -> tuple[str, int, int]:
    """The target's path without the numbers of blocks, and its size: equal for the same layer of every block."""
    return NUMBER.sub("*", target.path), target.d_in, target.d_out
