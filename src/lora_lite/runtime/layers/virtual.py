"""Embeddings, convolutions and norms as linear layers of an input that is never built: one-hot rows, unfolded patches,
one input per feature.

A page that only multiplies x by a matrix (`x @ M`) runs on them unchanged. Anything else it does to x raises at attach.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._torch import conv_padding
from ...core.errors import TargetError
from .norm import norm_of

PLACES = ("embedding", "conv", "norm")
_APPLY: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class VirtualInput:
    """The part of a tensor's interface that both kinds share."""

    requires_grad = False

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # compilers ask for protocols, such as __torch_function__
            raise AttributeError(name)
        raise TypeError(f"x.{name}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Tensor:
        first: Any = args[0] if args else None
        second: Any = args[1] if len(args) > 1 else None
        if func in (torch.matmul, Tensor.matmul, operator.matmul):
            if isinstance(first, VirtualInput):
                return first.__matmul__(second)
            if torch.compiler.is_compiling():  # x @ M arrives as M's reflected product; M @ x was refused at attach
                return second.__matmul__(first)
        raise TypeError(f"{getattr(func, '__name__', func)} of x")

    def dim(self) -> int:
        return len(self.shape)

    def __matmul__(self, other: Tensor) -> Tensor:
        raise NotImplementedError

    def index_select(self, dim: int, index: Tensor) -> VirtualInput:
        raise NotImplementedError

    def dropout(self, p: float) -> VirtualInput:
        raise NotImplementedError


class Lookup(VirtualInput):
    """One-hot rows (…, V) for the token ids (…): x @ M picks rows of M."""

    def __init__(self, ids: Tensor, size: int, dtype: torch.dtype) -> None:
        super().__init__((*ids.shape, size), dtype, ids.device)
        self.ids = ids

    def __matmul__(self, other: Tensor) -> Tensor:
        return F.embedding(self.ids, other)

    def index_select(self, dim: int, index: Tensor) -> Any:
        if dim == -1:  # few columns of the one-hot rows are small enough to be built
            return (self.ids[..., None] == index).to(self.dtype)
        return Lookup(self.ids.index_select(dim, index), self.shape[-1], self.dtype)

    def dropout(self, p: float) -> Lookup:
        raise TargetError(
            "dropout on the one-hot input of an embedding has no meaning; set dropout=0 or exclude the embedding."
        )


class Patches(VirtualInput):
    """The patches (B, …, C·k) that a convolution multiplies with its kernel: x @ M is a convolution with M's columns as
    kernels."""

    def __init__(self, module: nn.Module, x: Tensor, spatial: tuple[int, ...]) -> None:
        kernel = tuple(module.kernel_size)  # type: ignore[arg-type]
        size = x.shape[1]
        for k in kernel:
            size *= k
        super().__init__((x.shape[0], *spatial, size), x.dtype, x.device)
        self.module, self.x, self.kernel = module, x, kernel

    def __matmul__(self, other: Tensor) -> Tensor:
        m: Any = self.module
        x, padding = self.x, m.padding
        if m.padding_mode != "zeros":
            x, padding = F.pad(x, conv_padding(m), mode=m.padding_mode), 0
        kernel = other.mT.reshape(other.shape[1], x.shape[1], *self.kernel)
        out = _APPLY[len(self.kernel)](x, kernel, None, m.stride, padding, m.dilation)
        return out.movedim(1, -1)

    def index_select(self, dim: int, index: Tensor) -> Patches:
        _rows_only(dim)
        return Patches(self.module, self.x.index_select(dim, index), self.shape[1:-1])

    def dropout(self, p: float) -> Patches:
        return Patches(self.module, F.dropout(self.x, p, True), self.shape[1:-1])


class Normed(VirtualInput):
    """n(x) (..., d) with one input per feature: x @ M = n(x) ∘ M for one row M (1, d)."""

    def __init__(self, n: Tensor) -> None:
        super().__init__((*n.shape[:-1], 1), n.dtype, n.device)
        self.n = n

    def __matmul__(self, other: Tensor) -> Tensor:
        if other.shape != (1, self.n.shape[-1]):
            raise TypeError(f"x @ M with M of shape {tuple(other.shape)}")
        return self.n * other[0]

    def index_select(self, dim: int, index: Tensor) -> Normed:
        _rows_only(dim)
        return Normed(self.n.index_select(dim, index))

    def dropout(self, p: float) -> Normed:
        return Normed(F.dropout(self.n, p, True))


def _rows_only(dim: int) -> None:
    if dim != 0:
        raise TypeError(f"x.index_select({dim}, index)")


def wrap(module: nn.Module, kind: str, x: Tensor, y: Tensor) -> tuple[VirtualInput, Tensor]:
    """(x, y) as a page wants them: y with its channels last."""
    if kind == "embedding":
        return Lookup(x, int(module.num_embeddings), y.dtype), y  # type: ignore[arg-type]
    if kind == "norm":
        return Normed(norm_of(module).normalise(x).to(y.dtype)), y
    last = y.movedim(1, -1)
    return Patches(module, x.to(y.dtype), tuple(last.shape[1:-1])), last


def unwrap_output(kind: str, y: Tensor) -> Tensor:
    """What the module returns: a convolution's channels go back to dimension 1."""
    return y.movedim(-1, 1) if kind == "conv" else y
