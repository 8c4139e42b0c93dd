"""When the package's own backward passes may be used."""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import functorch_is_active


def own_backward() -> bool:
    """False under a compiler, which derives a backward pass of its own, and under `torch.func` transforms, which need
    one that they can follow."""
    return not (torch.compiler.is_compiling() or functorch_is_active())


def own_products(t: Tensor) -> bool:
    """For a backward pass of matrix products; False under autocast too, which changes dtypes in the forward pass only.
    t: one of the factors."""
    if not (torch.is_grad_enabled() and own_backward()):
        return False
    return t.is_meta or not torch.is_autocast_enabled(t.device.type)  # which raises on meta
