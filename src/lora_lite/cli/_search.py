"""Weights of adapters chosen by the loss on rows of data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lora_lite as ll

from ._base import positions_of
from ._console import Bar, table
from ._rows import Reader, RowFlags, check_data
from ._session import pad_of

MOST = 1000
"""Combinations of weights that are tried at most."""
Point = tuple[dict[str, float], float]
"""Weights of the adapters, and the loss."""


@dataclass(frozen=True, kw_only=True)
class SearchFlags(RowFlags):
    """The flags of a search."""

    search: tuple[float, ...] = ()
    """Weights to try, for instance: --search 0 0.25 0.5 0.75 1 1.25. Needs --data."""
    data: str | None = None
    """Rows for the search, which neither trained the adapters nor will test them: wordmath (its validation split), a
    file, or a data set of the hub."""
    rows: int = 200
    """At most so many rows."""
    batch_size: int = 16
    """Rows per forward pass."""


def check_search(args: SearchFlags) -> None:
    """Values that no later step would catch with a good sentence."""
    if bool(args.search) != (args.data is not None):
        raise ll.ConfigError("--search and --data belong together: --search 0 0.5 1 --data rows.jsonl")
    if args.rows < 1 or args.batch_size < 1:
        raise ll.ConfigError("--rows and --batch-size must be positive.")
    if not all(math.isfinite(w) for w in args.search):
        raise ll.ConfigError(f"--search takes finite numbers, got {' '.join(map(str, args.search))}.")
    if args.data is not None:
        check_data(args.data)


def corners(names: Sequence[str], weights: Sequence[float]) -> list[dict[str, float]]:
    """Every combination of these weights.

    Raises:
        ConfigError: there are too many.
    """
    if len(weights) ** len(names) > MOST:
        raise ll.ConfigError(
            f"--search: {len(weights)} weights for {len(names)} adapters are {len(weights) ** len(names):,} "
            f"combinations; at most {MOST:,} are tried."
        )
    return [dict(zip(names, point, strict=True)) for point in itertools.product(weights, repeat=len(names))]


def tried(args: SearchFlags, model: Any, tokenizer: Any, name: str, points: Sequence[dict[str, float]]) -> list[Point]:
    """The loss with every one of these weights."""
    from ..demo.evaluate import mean_loss

    assert args.data is not None
    reader = Reader(args, tokenizer, positions_of(name))
    rows = reader.tokens(reader.rows(args.data, "validation", args.rows)).rows
    found = []
    with Bar("searching", len(points)) as bar:
        for i, point in enumerate(points, 1):
            with ll.active(model, {n: w for n, w in point.items() if w} or None):
                found.append((point, mean_loss(model, rows, args.batch_size, pad_of(tokenizer))))
            bar.update(i, f"loss {found[-1][1]:.4f}")
    return found


def show_curve(curve: Sequence[Point]) -> None:
    """The losses as a table, the lowest marked."""
    if not curve:
        return
    best = min(loss for _, loss in curve)
    names = list(curve[0][0])
    rows = [[*(f"{w[n]:g}" for n in names), f"{loss:.4f}", "lowest" * (loss == best)] for w, loss in curve]
    table((*names, "loss", ""), rows)
