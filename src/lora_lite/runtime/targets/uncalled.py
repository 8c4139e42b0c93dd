"""Layers of well-known classes that are never called as modules, or not always: other code reads their weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn


class Known(NamedTuple):
    """Children of one class whose weights go past their hooks."""

    children: tuple[str, ...]
    why: str
    where: Callable[[Any], bool] = lambda module: True
    """Of which modules of the class it is so."""


def _in_slices(module: Any) -> bool:
    return getattr(module, "pretraining_tp", 1) > 1 and bool(getattr(module, "slow_but_exact", False))


A_FUNCTION = "its weight goes to F.multi_head_attention_forward"
MAPS = Known(("k_proj",), "its weight is used as the kernel of a convolution")
NEVER = {
    "MultiheadAttention": Known(("out_proj",), "nn.MultiheadAttention passes its weight to a function"),
    "WavLMAttention": Known(("q_proj", "k_proj", "v_proj", "out_proj"), A_FUNCTION),
    "TDNNLayer": Known(("kernel",), "its weight is used as the kernel of a convolution"),
    "DetrMHAttentionMap": MAPS,
    "ConditionalDetrMHAttentionMap": MAPS,
    "MaskFormerDetrMHAttentionMap": MAPS,
    "BloomAttention": Known(("dense",), "pretraining_tp > 1 reads its weight in slices", _in_slices),
    "BloomMLP": Known(("dense_4h_to_h",), "pretraining_tp > 1 reads its weight in slices", _in_slices),
}
"""Class -> what is never called."""
SCAN = Known(("x_proj", "dt_proj"), "fused scans read its weight")
AT_TIMES = {"MambaMixer": SCAN, "FalconMambaMixer": SCAN, "JambaMambaMixer": SCAN}
"""Class -> what is called on some devices and not on others."""


def find(model: nn.Module, known: dict[str, Known]) -> dict[str, str]:
    """Path -> why its forward is not called."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        one = next((known[c.__name__] for c in type(module).__mro__ if c.__name__ in known), None)
        if one is not None and one.where(module):
            found |= {f"{path}.{child}" if path else child: one.why for child in one.children}
    return found
