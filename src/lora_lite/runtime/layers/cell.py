"""The one matrix of an ordinary layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..model.kind import Cell, Kind, Part
from .tensors import bias_of, check_readable


class MatrixCell(Cell):
    """W and b of a layer that multiplies with its stored weight."""

    def __init__(self, kind: Kind, module: nn.Module, path: str) -> None:
        self.kind, self.module, self.path = kind, module, path

    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        stored = self.kind.stored(self.module)
        check_readable(stored, self.path)
        return self.matrix(stored.detach()).to(dtype), self.bias(dtype)

    def matrix(self, stored: Tensor) -> Tensor:
        return self.kind.as_matrix(self.module, stored)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        b = self.kind.bias(self.module)
        return None if b is None else b.detach().to(dtype)

    def write(self, part: Part, block: Tensor) -> Tensor:
        weight = self.kind.stored(self.module).detach()
        matrix = self.kind.as_matrix(self.module, weight)
        matrix[part] = block  # which rounds it
        if matrix.data_ptr() != weight.data_ptr():  # a copy, as of a kernel with its channels last
            weight.copy_(self.kind.as_stored(self.module, matrix))
        return matrix[part]

    def write_bias(self, b: Tensor) -> None:
        old = bias_of(self.module)
        if old is not None:
            old.copy_(b.to(old.dtype))
        elif bool(b.any()):
            self.module.__dict__.pop("bias", None)  # a layer may say `self.bias = None` before it knows of parameters
            new = nn.Parameter(b.to(self.kind.stored(self.module).dtype), requires_grad=False)
            self.module.register_parameter("bias", new)


def rounding(stored: Tensor, exact: Tensor) -> float:
    """Largest |stored − exact|, relative to the largest entry."""
    return float((stored.to(exact.dtype) - exact).abs().max() / exact.abs().max().clamp_min(1e-30))
