"""The one matrix of an ordinary layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..model.kind import Cell, Function, Kind
from .tensors import bias_of, check_readable

COLUMNS = 1024  # of the identity, pushed through the pages at a time


class MatrixCell(Cell):
    """W and b of a layer that multiplies with its stored weight."""

    def __init__(self, kind: Kind, module: nn.Module, path: str) -> None:
        self.kind, self.module, self.path = kind, module, path

    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        stored = self.kind.stored(self.module)
        check_readable(stored, self.path)
        return self.kind.as_matrix(self.module, stored.detach()).to(dtype), self._bias(dtype)

    def write(self, w: Tensor, b: Tensor) -> float:
        weight = self.kind.stored(self.module)
        stored = w.to(weight.dtype)
        weight.copy_(self.kind.as_stored(self.module, stored))
        self._write_bias(b)
        return rounding(stored, w)

    def read_off(self, f: Function, w: Tensor) -> tuple[Tensor, Tensor]:
        new, zero = torch.empty_like(w), f(w.new_zeros(1, w.shape[1]))[0]
        for start, eye in identity(w):
            new[:, start : start + eye.shape[0]] = (f(eye) - zero).mT
        return new, zero

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        b = self.kind.bias(self.module)
        return None if b is None else b.detach().to(dtype)

    def _write_bias(self, b: Tensor) -> None:
        old = bias_of(self.module)
        if old is not None:
            old.copy_(b.to(old.dtype))
        elif bool(b.any()):
            self.module.__dict__.pop("bias", None)  # a layer may say `self.bias = None` before it knows of parameters
            new = nn.Parameter(b.to(self.kind.stored(self.module).dtype), requires_grad=False)
            self.module.register_parameter("bias", new)


def identity(w: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, up to `COLUMNS` rows of the identity (n, d_in)) until all of W's inputs had theirs."""
    d_in = w.shape[1]
    for start in range(0, d_in, COLUMNS):
        n = min(COLUMNS, d_in - start)
        eye = w.new_zeros(n, d_in)
        eye[torch.arange(n), torch.arange(start, start + n)] = 1
        yield start, eye


def rounding(stored: Tensor, exact: Tensor) -> float:
    """Largest |stored − exact|, relative to the largest entry."""
    return float((stored.to(exact.dtype) - exact).abs().max() / exact.abs().max().clamp_min(1e-30))
