"""Updates with few trained numbers at drawn positions of a matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from ..core import Layer, ParamSpec
from ..ops.transforms import ascending


def position_spec(rows: int, columns: int, n: int) -> ParamSpec:
    """The buffer (2, n) of n distinct positions (row, column), in the order of rows."""

    def fill(t: Tensor, generator: Generator) -> None:
        flat = distinct(rows * columns, n, generator)
        t.copy_(torch.stack((flat // columns, flat % columns)))

    return ParamSpec((2, n), init=fill, as_buffer=True, dtype=torch.int32, below=(rows, columns))


def distinct(total: int, n: int, generator: Generator) -> Tensor:
    """n distinct numbers below `total`, ascending, every set as likely as any other; memory of n numbers where n is
    small."""
    if total < 8 * n:
        return torch.randperm(total, generator=generator)[:n].sort().values
    found = torch.randint(total, (0,))
    while len(found) < n:
        found = ascending(torch.cat((found, torch.randint(total, (2 * n,), generator=generator))))
    return found[torch.randperm(len(found), generator=generator)[:n]].sort().values


def positions(layer: Layer[Any]) -> tuple[Tensor, Tensor]:
    """Rows and columns of `lora_at`."""
    rows, columns = layer.lora_at.unbind()
    return rows, columns


def largest(M: Tensor, n: int, smallest: bool = False) -> Tensor:
    """Positions (2, n) of the n entries of M with the largest absolute values, in the order of rows."""
    flat = M.abs().flatten().topk(n, largest=not smallest).indices.sort().values
    return torch.stack((flat // M.shape[1], flat % M.shape[1]))
