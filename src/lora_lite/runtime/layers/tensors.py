"""The tensors of a layer: weight and bias, where they lie, whether they are ordinary ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from ..._torch import is_fake
from ...core.errors import WeightError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def stored_weight(module: nn.Module) -> Tensor:
    """`module.weight`, known to be a tensor; the parameter, whatever stands before it."""
    w = module._parameters.get("weight")
    w = module.weight if w is None else w
    assert isinstance(w, Tensor)
    return w


def stored_dtype(module: nn.Module) -> torch.dtype:
    """The dtype in which it stores its weight; fp32 where it has none."""
    w = getattr(module, "weight", None)
    return w.dtype if isinstance(w, Tensor) else torch.float32


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias, or None."""
    b = getattr(module, "bias", None)
    return b if isinstance(b, Tensor) else None


def is_ordinary(w: object) -> bool:
    """Whether `w` is a dense floating tensor of torch's own type, or stands for one without values. torchao keeps
    `nn.Linear` and changes this type."""
    if not isinstance(w, Tensor) or w.dtype not in FLOATS:
        return False
    return (type(w) in (nn.Parameter, Tensor) and type(w.data) is Tensor) or is_fake(w)


def is_packed(w: object, numel: int) -> bool:
    """Whether `w` is anything but a floating tensor of so many numbers; a shard of one counts as one."""
    if not isinstance(w, Tensor) or (type(w) not in (nn.Parameter, Tensor) and not is_sharded(w) and not is_fake(w)):
        return True
    return w.dtype not in FLOATS or w.numel() != numel


def is_sharded(t: Tensor | None) -> bool:
    """Whether `t` is a DTensor or a ZeRO-3 parameter; looks only at modules that are already imported."""
    tensor_module = sys.modules.get("torch.distributed.tensor")
    return t is not None and (
        hasattr(t, "ds_id") or (tensor_module is not None and isinstance(t, tensor_module.DTensor))
    )


def device_of(module: nn.Module) -> torch.device:
    """The device of a layer's first tensor."""
    for table in (module._parameters, module._buffers):  # of a layer with many adapters, only the first is looked at
        for t in table.values():
            if t is not None:
                return t.device
    return next((t.device for t in _tensors(module)), torch.device("cpu"))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from chain(module.parameters(), module.buffers())
    w = getattr(module, "weight", None)
    if isinstance(w, Tensor):  # experts own no tensor, and show their module's
        yield w
    for value in vars(module).values():  # HQQ keeps its packed weight as a plain attribute
        if isinstance(value, Tensor):
            yield value


def laid_out_as(new: Tensor, like: Tensor) -> Tensor:
    """`new` with the strides of `like`, which code behind a layer may rely on: a `view`, and kernels that are chosen by
    the memory format."""
    if new.stride() == like.stride() or new.shape != like.shape or 0 in like.stride():  # several share memory there
        return new
    return torch.empty_strided(like.shape, like.stride(), dtype=new.dtype, device=new.device).copy_(new)


def exact_dtype(device: torch.device) -> torch.dtype:
    """fp64, or fp32 where the device has no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_readable(w: object, path: str) -> None:
    """Raise where a weight has no values here.

    Raises:
        WeightError: it is on the meta device or sharded.
    """
    if not isinstance(w, Tensor):
        return
    if w.is_meta:
        raise WeightError(
            f"{path}: the weight is on the meta device (offloaded by accelerate, or not loaded yet), so it cannot be "
            "read. Load the model without offloading, from_pretrained(..., device_map=None), and attach; then it may "
            "be offloaded: accelerate.cpu_offload(model), accelerate.disk_offload(model, folder)."
        )
    if is_sharded(w):
        raise WeightError(f"{path}: the weight is sharded. Attach before fully_shard / deepspeed.initialize.")
