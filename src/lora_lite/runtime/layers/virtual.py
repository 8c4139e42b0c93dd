"""The input of a layer that is linear in something it never builds: one-hot rows, unfolded patches, one input per
feature.

A page that only multiplies x by a matrix (`x @ M`) runs on it unchanged. Anything else it does to x raises at attach.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor


class VirtualInput:
    """The part of a tensor's interface that all of them share."""

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

    def index_select(self, dim: int, index: Tensor) -> Any:
        raise NotImplementedError

    def dropout(self, p: float) -> VirtualInput:
        raise NotImplementedError


def rows_only(dim: int) -> None:
    """Raise where a page selects along anything but the batch."""
    if dim != 0:
        raise TypeError(f"x.index_select({dim}, index)")


def refuse_input(kind: str, variant: Any) -> str:
    """Why a method that does more with its input than a product cannot stand on a virtual one; empty where it can."""
    article = "an" if kind[0] in "aeiou" else "a"
    if variant.forward_input is not None:
        why = "rewrites its layer's input"
    elif variant.group_init is not None:
        why = "starts from data"
    else:
        return ""
    return f"variant {variant.name!r} {why}, which {article} {kind} does not offer; take it out of target_kinds."
