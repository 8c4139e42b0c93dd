"""Norms: a product of the normalised input with one number per feature."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import WeightError
from ..model.kind import Cell, Kind, Part
from .cell import MatrixCell
from .norm_reading import Norm, norm_of, norm_width, read_norm
from .tensors import bias_of, exact_dtype, stored_weight
from .virtual import VirtualInput, rows_only


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
        rows_only(dim)
        return Normed(self.n.index_select(dim, index))

    def dropout(self, p: float) -> Normed:
        return Normed(F.dropout(self.n, p, True))


class NormCell(MatrixCell):
    """W (d, 1): the gain, which is the stored weight plus the norm's offset."""

    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        return norm_of(self.module).gain(self.module, dtype)[:, None], self.bias(dtype)

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.to(exact_dtype(stored.device))[:, None] + norm_of(self.module).offset

    def write(self, part: Part, block: Tensor) -> Tensor:
        weight, offset = stored_weight(self.module).detach(), norm_of(self.module).offset
        weight[part[0]] = (block[:, 0] - offset).to(weight.dtype)
        return weight[part[0]].to(block.dtype)[:, None] + offset

    def write_bias(self, b: Tensor) -> None:
        if bias_of(self.module) is None and bool(b.any()):
            raise WeightError(
                f"{self.path}: the adapter adds a bias, and this {type(self.module).__name__} has none to hold it; "
                "keep the adapter attached."
            )
        super().write_bias(b)

    def units(self, start: int, n: int, w: Tensor, room: Tensor | None = None) -> Any:
        return Normed(torch.ones_like(w.mT))

    def zero(self, w: Tensor) -> Any:
        return Normed(torch.zeros_like(w.mT))


class NormKind(Kind):
    """A norm over the last dimension with one weight per feature: d_in = 1."""

    name = "norm"
    offered = False

    def size(self, module: nn.Module) -> tuple[int, int] | None:
        width = norm_width(module)
        return None if width is None else (1, width)

    def refuse(self, module: nn.Module, path: str, variant: Any, cfg: Any) -> str:
        if variant.norms:
            return ""
        return (
            f"variant {variant.name!r} cannot stand on a norm; take it out of target_kinds, or train norms whole: "
            f"train_modules=({path.rsplit('.', 1)[-1]!r},)."
        )

    def inspect(self, module: nn.Module, path: str) -> Norm:
        return read_norm(module, path)

    def trial(self, module: nn.Module, dtype: torch.dtype, d_out: int) -> tuple[Any, Tensor]:
        n = torch.zeros(2, 3, d_out, dtype=dtype, device=stored_weight(module).device)
        return Normed(n), n

    def enter(self, module: nn.Module, x: Tensor, y: Tensor) -> tuple[Any, Tensor]:
        return Normed(norm_of(module).normalise(x).to(y.dtype)), y

    def writable(self, module: nn.Module) -> bool:
        return True

    def as_matrix(self, module: nn.Module, stored: Tensor) -> Tensor:
        return stored[:, None]

    def as_stored(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix[:, 0]

    def cells(self, module: nn.Module, path: str) -> list[Cell]:
        return [NormCell(self, module, path)]
