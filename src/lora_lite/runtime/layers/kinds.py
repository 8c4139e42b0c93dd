"""What kind of layer a module is, and how large."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor, nn

from .bank import Bank
from .norm import norm_width

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer that stores (nx, nf), known by its attributes."""
    return (
        type(module).__name__ == "Conv1D"
        and hasattr(module, "nf")
        and isinstance(getattr(module, "weight", None), Tensor)
    )


def stored_weight(module: nn.Module) -> Tensor:
    """`module.weight`, known to be a tensor."""
    w = module.weight
    assert isinstance(w, Tensor)
    return w


def dims(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear-like layer, or None when it is not one."""
    if is_conv1d(module):
        d_in, d_out = stored_weight(module).shape
        return int(d_in), int(d_out)
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        d_in, d_out = (getattr(module, n, None) for n in names)
        if isinstance(d_in, int) and isinstance(d_out, int) and not isinstance(module, (nn.Bilinear, nn.Identity)):
            return d_in, d_out
    return None


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def extent(module: nn.Module) -> tuple[str, int, int] | None:
    """(kind, d_in, d_out) of anything that multiplies with one matrix: "linear", "embedding" (of one-hot rows), "conv"
    (of unfolded patches, d_in = C·k), "norm" (of one input per feature, d_in = 1) or "experts" (each of them); None for
    any other module."""
    if isinstance(module, Bank):
        return "experts", module.d_in, module.d_out
    if isinstance(module, nn.Embedding):
        return "embedding", module.num_embeddings, module.embedding_dim
    if isinstance(module, CONVS):
        return "conv", module.in_channels // module.groups * math.prod(module.kernel_size), module.out_channels
    size = dims(module)
    if size is None and (width := norm_width(module)) is not None:
        return "norm", 1, width
    return None if size is None else ("linear", *size)


def dense_view(module: nn.Module) -> Tensor:
    """A plain layer's stored weight seen as (d_out, d_in), or (E, d_out, d_in), without a copy."""
    if isinstance(module, Bank):
        return module.dense()
    w = stored_weight(module)
    return w.mT if is_conv1d(module) or isinstance(module, nn.Embedding) else w.flatten(1)


def is_sharded(t: Tensor | None) -> bool:
    """Whether `t` is a DTensor or a ZeRO-3 parameter; looks only at modules that are already imported."""
    tensor_module = sys.modules.get("torch.distributed.tensor")
    return t is not None and (
        hasattr(t, "ds_id") or (tensor_module is not None and isinstance(t, tensor_module.DTensor))
    )


def is_plain(module: nn.Module) -> bool:
    """Whether `weight` is an ordinary dense matrix that the layer multiplies with. Decided by the tensor, not the
    class: torchao keeps nn.Linear."""
    w = module._parameters.get("weight")
    if w is None or type(w) not in (nn.Parameter, Tensor) or type(w.data) is not Tensor or w.dtype not in FLOATS:
        return False
    size = dims(module)
    if is_conv1d(module):
        return tuple(w.shape) == size
    if isinstance(module, (nn.Embedding, *CONVS)):
        return type(module).forward in {nn.Embedding.forward, *(conv.forward for conv in CONVS)}
    return type(module).forward is nn.Linear.forward and size is not None and tuple(w.shape) == (size[1], size[0])


def is_quantised(module: nn.Module) -> bool:
    """Its weight is packed: no ordinary floating matrix of the right size."""
    w = getattr(module, "weight", None)
    size: tuple[int, ...] = (extent(module) or ("",))[1:]
    if not isinstance(w, Tensor) or len(size) != 2:
        return True
    if isinstance(module, Bank):
        return False  # only plain parameters become banks
    packed_type = type(w) not in (nn.Parameter, Tensor) and not is_sharded(w)
    return packed_type or w.dtype not in FLOATS or w.numel() != size[0] * size[1]


def device_of(module: nn.Module) -> torch.device:
    """The device of a layer's first tensor."""
    for t in (
        *module.parameters(recurse=False),
        *module.buffers(recurse=False),
        *module.parameters(),
        *module.buffers(),
    ):
        return t.device
    if isinstance(module, Bank):
        return module.weight.device
    for value in vars(module).values():  # HQQ keeps its packed weight as a plain attribute
        if isinstance(value, Tensor):
            return value.device
    return torch.device("cpu")


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias, or None."""
    b = getattr(module, "bias", None)
    return b if isinstance(b, Tensor) else None
