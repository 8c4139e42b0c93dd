"""One whole tensor from a shard: FSDP2's DTensor and DeepSpeed's ZeRO-3 parameters."""

from __future__ import annotations

from torch import Tensor


def full_tensor(t: Tensor) -> Tensor:
    """The complete tensor; every rank must call it. A plain tensor is returned as it is."""
    if hasattr(t, "ds_id"):
        import deepspeed  # pyright: ignore[reportMissingImports]

        with deepspeed.zero.GatheredParameters([t]):
            return t.detach().clone()
    return t.full_tensor() if hasattr(t, "full_tensor") else t  # type: ignore[operator]
