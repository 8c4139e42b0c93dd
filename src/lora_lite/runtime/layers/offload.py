"""Layers whose tensors accelerate keeps elsewhere between calls, in memory or on disk, and brings for the layer's own
forward alone: the hooks of an adapter run before and after that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...core.errors import WeightError


def is_away(module: nn.Module) -> bool:
    """Whether the layer's tensors are offloaded at this moment."""
    return "_hf_hook" in module.__dict__ and any(p is not None and p.is_meta for p in module._parameters.values())


@contextmanager
def brought_back(module: nn.Module, path: str) -> Iterator[None]:
    """Inside, the layer's tensors, those of its adapters among them, are where it runs.

    Raises:
        WeightError: in training: what is brought is a copy, which no optimiser knows.
    """
    if module.training and torch.is_grad_enabled():
        raise WeightError(
            f"{path}: accelerate offloads this layer, and with it the adapter's tensors, so nothing on it would train. "
            "Run an offloaded model in eval mode or without gradients; to train, keep adapted layers on a device, or "
            "shard with FSDP2 or DeepSpeed."
        )
    hook: Any = module.__dict__["_hf_hook"]
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)
