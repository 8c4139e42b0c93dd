"""Blocks: the residual stream after one of them, which no weight stands for."""

from __future__ import annotations

from torch import Tensor, nn

from ..model.kind import Kind


class Block(Kind):
    """A decoder block; d_in = d_out = the width of the stream. `structure.describe` finds them."""

    name = "block"
    apart = stream = True

    def size(self, module: nn.Module) -> tuple[int, int] | None:
        return None  # a block is known by the stack that it lies in

    def sample(self, module: nn.Module, rows: Tensor, columns: Tensor) -> None:
        return None
