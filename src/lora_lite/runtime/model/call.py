"""What belongs to calls of a model: prompts, positions, rows, the selection that acts."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

Chosen = tuple[tuple[str, float], ...]
"""Adapters with their weights, in attach order."""
Traced = tuple[tuple[str, float | Tensor], ...]
"""The same as a compiler sees it: a weight is a tensor where a graph need not depend on its value."""
Names = tuple[str | None, ...]
"""One adapter per batch row; None is the bare base."""
Columns = tuple[()] | tuple[Tensor | None, Tensor | None, int]
"""Where some wording's tokens lie in a call, see `Call`."""
Led = dict[str, tuple[Tensor, Tensor]]
"""Path of an attention module -> the keys and values (B or 1, heads, n, head_dim) that virtual tokens leave there."""
Memo = dict[tuple[object, ...], tuple[tuple[object, ...], object]]
"""What -> (versions of the tensors that it was computed from, value)."""


def is_one(weight: float | Tensor) -> bool:
    """Whether a weight changes nothing; one that a compiler follows is neither 1 nor 0."""
    return not isinstance(weight, Tensor) and weight == 1.0


def is_zero(weight: float | Tensor) -> bool:
    """Whether an adapter of this weight does not act."""
    return not isinstance(weight, Tensor) and weight == 0.0


class Prompt:
    """What a `with ll.prompt(...)` block says."""

    def __init__(self, lengths: Tensor | None) -> None:
        self.lengths = lengths
        """(rows,) on the CPU; None: all tokens of a call that are no padding."""
        self.ends: int | None = None
        """Column at which the prompts of the present generation are known to be over."""


class Said(NamedTuple):
    """What the `with ll.prompt(...)` and `with ll.context(...)` blocks of a thread say."""

    prompt: Prompt | None = None
    context: Mapping[str, Tensor] = {}  # an empty proxy would be true to a compiler


class Rows(NamedTuple):
    """One adapter per row of the model's batch, and per element of batches inside that are others."""

    names: Names
    """One per row of the model's own batch."""
    inner: Names = ()
    """One per element of an inner batch; empty: none was named."""
    at: tuple[tuple[str, Names], ...] = ()
    """(path of a layer, one per element of its batch)."""


class Extent(NamedTuple):
    """The batch of a running call of the model."""

    batch: int
    tokens: int | None
    """Second dimension of its input, where that counts tokens."""
    others: tuple[int, ...] = ()
    """First dimensions of the call's other tensors that are not the batch."""
    named: bool = True
    """The input bears a name that says that its batch comes first."""


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


Selection = tuple[Chosen, Rows | None, Call | None, Extent | None]
"""(active adapters with weights, one adapter per row or None, token positions or None, the batch or None)."""


class Running:
    """What one thread knows of the call of the model that it runs; nothing of it lives on the model, which several
    threads may call at once."""

    def __init__(self) -> None:
        self.selection: Selection | None = None
        """What acts until the call ends, whatever becomes of the model's selection; None outside of a call."""
        self.in_call = False
        self.grad = False
        """Whether the call was entered with gradients enabled."""
        self.fed: set[str] = set()
        """Paths of awaited layers that ran with a gradient in the last call."""
        self.newly_gradless: list[str] = []
        """Paths of layers that ran without one in it, and in no call before, see `call.recompute`."""
        self.memo: Memo | None = None
        """What pages keep from one step of cached decoding to the next, see `view.kept`; None where nothing may be
        kept."""
        self.decoding: tuple[weakref.ref[object], Memo] | None = None
        """(weak reference to the key-value cache that this thread continues, its memo)."""
        self.previous: Tensor | None = None
        """Tokens of the last call, where the next one may show that they were a prompt growing without a cache."""
        self.begun: dict[str, Begun] = {}
        """Wording of positions -> what this call leaves for one that continues its cache."""
        self.said: Said | None = None
        """What this thread's own blocks say."""
        self.pending: list[Selection] = []
        """Selections under which checkpointed forwards ran and wait for their recomputation."""
        self.pending_done = False
        self.penalties: dict[tuple[str, str], Tensor] = {}
        """(adapter, path) -> what its page said of the activations in the last training call."""

    @property
    def call(self) -> Call | None:
        """Token positions of the call, for the adapters that ask for some."""
        return None if self.selection is None else self.selection[2]

    def end(self) -> None:
        """The call is over."""
        self.selection = self.memo = None
        self.in_call = self.grad = False
        self.begun = {}


class PerThread(threading.local):
    """`now`: a `Running` for each thread that asks."""

    def __init__(self) -> None:
        self.now = Running()


@dataclass
class Stack:
    """What several adapters of one layer were laid side by side to, kept while their tensors do not change."""

    epoch: int
    own: list[Tensor]
    """The stored tensors that went in, and"""
    versions: int
    """the sum of their versions."""
    parts: tuple[object, ...]
    block: int = 0
    """The last `ll.rows` block that used it, and"""
    places: int = 0
    """the sum of the addresses of the tensors, looked at once in each block."""
