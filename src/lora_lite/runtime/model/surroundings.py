"""What the caller's surroundings must not decide: where an adapter's tensors are made, and whether they can train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def own_surroundings() -> Iterator[None]:
    """Inside, tensors are ordinary ones, and on the CPU where no device is named: without `inference_mode`, without
    gradients, without the caller's `torch.device(...)` or `torch.set_default_device(...)`."""
    elsewhere = torch.empty(0).device.type != "cpu"
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu") if elsewhere else nullcontext():
        yield
