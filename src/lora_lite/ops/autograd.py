"""When the package's own backward passes may be used."""

from __future__ import annotations

import torch


def own_backward() -> bool:
    """False under a compiler, which derives a backward pass of its own, and under `torch.func` transforms, which need one that they can follow."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
