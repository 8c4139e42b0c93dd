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


@dataclass(frozen=True)
class Point:
    """What some weights of the adapters give."""

    weights: dict[str, float]
    loss: float
    kept: float | None = None
    """The loss on the rows of --keep."""

    @property
    def told(self) -> dict[str, float]:
        """The losses, as JSON has them."""
        return {"loss": self.loss} | ({} if self.kept is None else {"kept": self.kept})


@dataclass(frozen=True, kw_only=True)
class SearchFlags(RowFlags):
    """The flags of a search."""

    search: tuple[float, ...] = ()
    """Weights to try, for instance: --search 0 0.25 0.5 0.75 1 1.25. Needs --data."""
    data: str | None = None
    """Rows for the search, which neither trained the adapters nor will test them: wordmath (its validation split), a
    file, or a data set of the hub."""
    keep: str | None = None
    """Rows of what the base knows and should not forget, in any form that --data takes: their loss stands beside each
    weight. An adapter that is scaled back forgets less, and often learns nearly as much."""
    rows: int = 200
    """At most so many rows."""
    batch_size: int = 16
    """Rows per forward pass."""


def check_search(args: SearchFlags) -> None:
    """Values that no later step would catch with a good sentence."""
    if bool(args.search) != (args.data is not None):
        raise ll.ConfigError("--search and --data belong together: --search 0 0.5 1 --data rows.jsonl")
    if args.keep is not None and not args.search:
        raise ll.ConfigError(
            "--keep shows a second loss beside each weight of --search: --search 0 0.5 1 --data rows.jsonl --keep "
            "known.jsonl"
        )
    if args.rows < 1 or args.batch_size < 1:
        raise ll.ConfigError("--rows and --batch-size must be positive.")
    if not all(math.isfinite(w) for w in args.search):
        raise ll.ConfigError(f"--search takes finite numbers, got {' '.join(map(str, args.search))}.")
    if args.data is not None:
        check_data(args.data)
    if args.keep is not None:
        check_data(args.keep)


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
    sources = [args.data] if args.keep is None else [args.data, args.keep]
    rows = [reader.tokens(reader.rows(source, "validation", args.rows)).rows for source in sources]
    found: list[Point] = []
    with Bar("searching", len(points)) as bar:
        for i, point in enumerate(points, 1):
            with ll.active(model, {n: w for n, w in point.items() if w} or None):
                losses = [mean_loss(model, some, args.batch_size, pad_of(tokenizer)) for some in rows]
            found.append(Point(point, *losses))
            bar.update(i, f"loss {found[-1].loss:.4f}")
    return found


def best_of(curve: Sequence[Point]) -> dict[str, float]:
    """The weights with the lowest loss."""
    return min(curve, key=lambda point: point.loss).weights


def show_curve(curve: Sequence[Point]) -> None:
    """The losses as a table, the lowest marked; of --keep, also what it grew from the base, where a weight of 0 shows
    it."""
    if not curve:
        return
    best, names = best_of(curve), list(curve[0].weights)
    base = next((p.kept for p in curve if not any(p.weights.values())), None)
    heads, rows = [*names, "loss"], [[*(f"{p.weights[n]:g}" for n in names), f"{p.loss:.4f}"] for p in curve]
    if curve[0].kept is not None:
        heads += ["kept", "forgotten"]
        for row, p in zip(rows, curve, strict=True):
            row += [f"{p.kept:.4f}", "-" if base is None or p.kept is None else f"{p.kept - base:+.4f}"]
    table((*heads, ""), [[*row, "lowest" * (p.weights == best)] for row, p in zip(rows, curve, strict=True)])
