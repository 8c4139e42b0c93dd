"""Numbers in a base weight with which no start gets anywhere, named by the layer that holds them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..._torch import is_fake
from ...core.errors import WeightError
from ..model.site import base_parameters
from .tensors import FLOATS, is_sharded

LARGEST = 1e15
"""Squares of larger numbers, and their sums, leave fp32."""


def check_sound(w: Tensor, path: str, variant: str) -> Tensor:
    """The weight itself.

    Raises:
        WeightError: it holds NaN, infinity, or numbers above `LARGEST`.
    """
    if why := fault(w):
        raise WeightError(
            f"{path}: its weight {why}, so variant {variant!r}, whose start reads it, has none there. Look at the "
            f"checkpoint; or leave the layer out: exclude_names=({path!r},)."
        )
    return w


def fault(w: Tensor) -> str:
    """What is wrong with a tensor's numbers; empty where nothing is, or where it has none."""
    if w.is_meta or not w.numel() or w.dtype not in FLOATS or is_sharded(w) or is_fake(w):
        return ""
    low, high = (float(t) for t in torch.aminmax(w.detach()))
    largest = max(-low, high)
    if largest <= LARGEST:
        return ""
    if largest < float("inf"):
        return f"holds numbers up to {largest:.0e}, and what is above {LARGEST:.0e} cannot be squared in fp32"
    return "holds NaN" if largest != largest or low != low else "holds infinity"


def first_fault(model: nn.Module) -> str:
    """The first parameter of the base that is not sound, as a sentence; empty where all are."""
    return next((f"{path} {why}" for path, p in base_parameters(model) if (why := fault(p))), "")
