"""What belongs to calls of a model: prompts, positions, rows, the selection that acts."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Chosen = tuple[tuple[str, float], ...]
"""Adapters with their weights, in attach order."""
Rows = tuple[str | None, ...]
"""One adapter per batch row; None is the bare base."""
Columns = tuple[()] | tuple[Tensor | None, Tensor | None, int]
"""Where some wording's tokens lie in a call, see `Call`."""
Led = dict[str, tuple[Tensor, Tensor]]
"""Path of an attention module -> the keys and values (B or 1, heads, n, head_dim) that virtual tokens leave there."""
Memo = dict[tuple[object, ...], tuple[tuple[object, ...], object]]
"""What -> (versions of the tensors that it was computed from, value)."""


class Prompt:
    """What a `with ll.prompt(...)` block says."""

    def __init__(self, lengths: Tensor | None) -> None:
        self.lengths = lengths
        """(rows,) on the CPU; None: all tokens of a call that are no padding."""
        self.ends: int | None = None
        """Column at which the prompts of the present generation are known to be over."""


@dataclass(frozen=True, eq=False)
class Begun:
    """What a call leaves behind for those that continue its cache, of positions that begin at some tokens."""

    cache: weakref.ref[object] | None
    """The cache it filled; None where the call did not bring it."""
    columns: int
    """Number of columns so far."""
    rows: Tensor
    """(B,) bool, True where the tokens have occurred."""
    tail: Tensor
    """(B, k − 1), the last tokens, with which the next ones may complete an occurrence."""


class Call:
    """What one call of the model has of its own: the positions for every wording that an acting adapter uses, the
    context, and what virtual tokens leave.

    `found[text]` is (index, keep, p): index (B, p + s) columns of prompt tokens and keep which of them are there; or
    index None and keep (B, T) the chosen columns; or both None: every column. An empty tuple: none.
    """

    def __init__(self, shape: tuple[int, int], found: dict[str, Columns]) -> None:
        self.shape, self.found = shape, found
        self.context: dict[str, Tensor] = {}
        """What `ll.context` says, one entry per row of the batch."""
        self.led: dict[str, Led] | None = None
        """Adapter -> what its virtual tokens leave on every attention module; empty while they run themselves."""

    def __eq__(self, other: object) -> bool:
        """By value, so that gradient checkpointing can tell two calls apart."""
        if not isinstance(other, Call) or self.shape != other.shape or self.found.keys() != other.found.keys():
            return self is other
        if self.led is not other.led or self.context.keys() != other.context.keys():
            return False
        if not all(_same((value,), (other.context[name],)) for name, value in self.context.items()):
            return False
        return all(_same(self.found[text], other.found[text]) for text in self.found)

    __hash__ = None  # type: ignore[assignment]


def _same(a: tuple[object, ...], b: tuple[object, ...]) -> bool:
    """Equal entries; tensors by value."""
    if len(a) != len(b):
        return False
    both = [(u, v) for u, v in zip(a, b, strict=True) if u is not v]
    return all(torch.equal(u, v) if isinstance(u, Tensor) and isinstance(v, Tensor) else u == v for u, v in both)


class Links:
    """Every step from the model down to an adapted layer, so that a replaced one is noticed at little cost."""

    def __init__(self, steps: list[tuple[nn.Module, str, nn.Module]], lost: set[str]) -> None:
        self.tables = [parent._modules for parent, _, _ in steps]
        self.names = [name for _, name, _ in steps]
        self.children: list[nn.Module | None] = [child for _, _, child in steps]
        self.lost = lost
        """Paths of targets that are not there any more."""

    def hold(self) -> bool:
        """Whether every child is still where it was. A module equals itself alone."""
        return list(map(dict.get, self.tables, self.names)) == self.children


@dataclass
class RowGroup:
    """The rows of one adapter along dim 0."""

    name: str
    index: Tensor
    """(k,) positions of its rows."""
    member: Tensor
    """(n,) bool, True at its rows."""


Selection = tuple[Chosen, Rows | None, Call | None]
"""(active adapters with weights, one adapter per row or None, token positions or None)."""


@dataclass
class Stack:
    """What several adapters of one layer were laid side by side to, kept while their tensors do not change."""

    epoch: int
    own: list[Tensor]
    """The stored tensors that went in, and"""
    versions: int
    """the sum of their versions."""
    parts: tuple[object, ...]
