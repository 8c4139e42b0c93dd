"""Convolutions: a product of unfolded patches, which are never built, with the flattened kernel."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._torch import conv_padding
from ..model.kind import Cell, Kind
from ..model.state import SITE
from .cell import MatrixCell
from .tensors import is_ordinary, is_packed, laid_out_as, stored_weight
from .tried import can_be_tried, has_own_forward, why_not_the_same
from .virtual import VirtualInput, refuse_input, rows_only

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PLAIN = {conv.forward for conv in CONVS}
_APPLY: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _conv(module: nn.Module) -> nn.Conv2d:
    """The module as one of `CONVS`, which have the same attributes."""
    return cast(nn.Conv2d, module)


class Patches(VirtualInput):
    """The patches (B, …, C·k) that a convolution multiplies with its kernel: x @ M is a convolution with M's columns as
    kernels."""

    def __init__(self, module: nn.Module, x: Tensor, spatial: tuple[int, ...]) -> None:
        kernel = _conv(module).kernel_size
        channels = x.shape[1] // _conv(module).groups
        super().__init__((x.shape[0], *spatial, channels * math.prod(kernel)), x.dtype, x.device)
        self.module, self.x, self.kernel = module, x, kernel

    def __matmul__(self, other: Tensor) -> Tensor:
        m: Any = self.module
        x, padding = self.x, m.padding
        if m.padding_mode != "zeros":
            x, padding = F.pad(x, conv_padding(m), mode=m.padding_mode), 0
        kernel = other.mT.reshape(other.shape[1], x.shape[1] // m.groups, *self.kernel)
        out = _APPLY[len(self.kernel)](x, kernel, None, m.stride, padding, m.dilation, m.groups)
        return out.movedim(1, -1)

    def index_select(self, dim: int, index: Tensor) -> Patches:
        rows_only(dim)
        return Patches(self.module, self.x.index_select(dim, index), self.shape[1:-1])

    def dropout(self, p: float) -> Patches:
        return Patches(self.module, F.dropout(self.x, p, True), self.shape[1:-1])


class Conv(Kind):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`: d_in = C·k, the size of a patch."""

    name = "conv"

    def size(self, module: nn.Module) -> tuple[int, int] | None:
        if not isinstance(module, CONVS):
            return None
        return module.in_channels // module.groups * math.prod(module.kernel_size), module.out_channels

    def refuse(self, module: nn.Module, path: str, variant: Any, cfg: Any) -> str:
        groups = _conv(module).groups
        if groups != 1 and vars(variant).get("holds") != "modules":  # a change of its own weight has its shape
            return f"a convolution with groups={groups} is not one matrix; add it to exclude_names."
        return refuse_input(self.name, variant)

    def trial(self, module: nn.Module, dtype: torch.dtype, d_out: int) -> tuple[Any, Tensor]:
        w = stored_weight(module)
        x = torch.zeros(self._input(module), dtype=w.dtype, device=w.device)
        with torch.no_grad():
            y = module.forward(x).to(dtype)
        return self.enter(module, x.to(dtype), y)

    def _input(self, module: nn.Module) -> tuple[int, ...]:
        """The shape of a small input."""
        m = _conv(module)
        size = [max(8, d * (k - 1) + 1) for k, d in zip(m.kernel_size, m.dilation, strict=True)]
        return (2, m.in_channels, *size)

    def enter(self, module: nn.Module, x: Tensor, y: Tensor) -> tuple[Any, Tensor]:
        """y with its channels last."""
        last = y.movedim(1, -1)
        return Patches(module, x.to(y.dtype), tuple(last.shape[1:-1])), last

    def leave(self, module: nn.Module, new: Tensor, y: Tensor) -> Tensor:
        """Channels where they were, in memory too: what follows may view them, and picks its algorithm by it."""
        return laid_out_as(new.movedim(-1, 1), y)

    def untried(self, module: nn.Module) -> bool:
        return has_own_forward(module, PLAIN) and not can_be_tried(module)

    def strange(self, module: nn.Module) -> str:
        if not has_own_forward(module, PLAIN) or not can_be_tried(module):
            return ""
        parent = next(conv for conv in CONVS if isinstance(module, conv))
        x = torch.randn(self._input(module), generator=torch.Generator().manual_seed(0))
        return why_not_the_same(module, parent.forward, x.to(stored_weight(module)))

    def is_plain(self, module: nn.Module) -> bool:
        plain = SITE in module.__dict__ or not self.strange(module)  # what is adapted was tried before
        return plain and is_ordinary(module._parameters.get("weight"))

    def is_quantised(self, module: nn.Module) -> bool:
        return is_packed(module.weight, math.prod(self.size(module) or ()))

    def as_matrix(self, module: nn.Module, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def as_stored(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.reshape(stored_weight(module).shape)

    def cells(self, module: nn.Module, path: str) -> list[Cell]:
        return [MatrixCell(self, module, path)]
