"""The key-value cache that a call continues: found by what it can do, since its argument's name changes."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

TELLING = (type(None), bool, int, float, str, Tensor, nn.Module, torch.dtype, torch.device, Enum, Mapping, list, tuple)
"""What is no cache of a class that nobody here knows."""


def cache_of(named: Mapping[str, Any]) -> Any:
    """An argument that knows how many tokens it holds (`get_seq_length`), or the older tuples of keys and values; None
    where the call brings neither."""
    for value in named.values():
        if hasattr(value, "get_seq_length"):
            return value
    for value in named.values():
        if _is_legacy(value):
            return value
    return None


def _is_legacy(value: Any) -> bool:
    """Whether it is ((key, value), ...) per layer, keys (B, heads, tokens, d)."""
    if not (isinstance(value, (tuple, list)) and value and isinstance(value[0], (tuple, list)) and value[0]):
        return False
    return isinstance(value[0][0], Tensor) and value[0][0].dim() == 4


def opaque(named: Mapping[str, Any]) -> str:
    """The argument that may be a cache and cannot say what it holds: an object of an unknown class, in a call that uses
    a cache or under a name that says so; empty where there is none, or beside a cache that can say it."""
    if cache_of(named) is not None:
        return ""
    for name, value in named.items():
        of_a_cache = named.get("use_cache") is True or "cache" in name or "past" in name
        if of_a_cache and not isinstance(value, TELLING) and not callable(value):
            return name
    return ""
