"""The key-value cache that a call continues: found by what it can do, since its argument's name changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


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
