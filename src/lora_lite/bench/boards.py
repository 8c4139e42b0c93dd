"""The leaderboard's tables: what ran under one protocol, at default sizes or near one number of parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import lora_lite as ll

from .board import Entry, Protocol, Row, Standing, standing
from .sizes import near

OWN = "at its own lr"
COLUMNS = (
    "method",
    "accuracy",
    "95 %",
    "seeds",
    "lr",
    OWN,
    "test loss",
    "trained",
    "file, KB",
    "step, MB",
    "step / lora",
    "forgotten",
)
EDGE = " at the end"


def begun(rows: Sequence[Row], protocol: Protocol, entries: Iterable[Entry]) -> list[Standing]:
    """The entries of which a run is finished."""
    found = [standing(rows, protocol, entry) for entry in entries]
    return [s for s in found if s.rates]


def in_order(standings: Iterable[Standing]) -> list[Standing]:
    """The best mean first."""
    return sorted(standings, key=lambda s: -(s.mean if s.mean is not None else -1.0))


def cells(s: Standing) -> list[str]:
    """One line of the table; "-" where a run is missing or the task has no such figure."""

    def shown(value: float | None, form: str, unit: float = 1.0) -> str:
        return "-" if value is None else format(value / unit, form)

    edge = EDGE if s.chosen is not None and len(s.rates) > 1 and s.chosen in (min(s.rates), max(s.rates)) else ""
    return [
        s.entry.label,
        shown(s.mean, ".1%"),
        "-" if s.half is None else f"±{100 * s.half:.1f}",
        str(len(s.finals)),
        shown(s.chosen, "g") + edge,
        shown(s.rates.get(ll.get_variant(s.entry.method).lr), ".1%"),
        shown(s.average("loss"), ".3f"),
        shown(s.average("trained"), ",.0f"),
        shown(s.average("file_bytes"), ",.0f", 1024),
        shown(s.average("step_mb"), ",.0f"),
        shown(s.average("step_vs_lora"), ".2f"),
        shown(s.forgotten, "+.3f"),
    ]


class Board(NamedTuple):
    """One table."""

    protocol: Protocol
    entries: list[Entry]
    parameters: int | None
    """None: default sizes; 0: sizes that were changed otherwise."""
    usual: Protocol
    """What the entries at default sizes ran under."""

    @property
    def name(self) -> str:
        """Task, steps and size, as a file's name has them."""
        size = "" if self.parameters is None else f"-{self.parameters}"
        return f"{self.protocol.task}-{self.protocol.steps}{size}"

    @property
    def title(self) -> str:
        size = f"about {self.parameters:,} trained parameters" if self.parameters else "other sizes"
        size = "default sizes" if self.parameters is None else size
        return f"{self.protocol.task}, {self.protocol.steps} steps, {size}"

    @property
    def columns(self) -> list[str]:
        """Those of the table: the recommended rate may be none of the grid."""
        return [c for c in COLUMNS if c != OWN or 1.0 in self.protocol.grid]

    def line(self, s: Standing) -> list[str]:
        return [cell for c, cell in zip(COLUMNS, cells(s), strict=True) if c in self.columns]

    def standings(self, rows: Sequence[Row]) -> list[Standing]:
        """The entries that have begun, the best mean first."""
        own, others = [e for e in self.entries if e.fields], [e for e in self.entries if not e.fields]
        return in_order([*begun(rows, self.protocol, own), *begun(rows, self.usual, others)])


def boards(rows: Sequence[Row]) -> list[Board]:
    """Everything that the rows hold: the task with most runs first, default sizes, then few parameters before many. On
    a board of one size stands, of a method that has no run for it, what has run at a size that comes near."""
    runs = Counter(row["task"] for row in rows)

    def order(key: Key) -> tuple[Any, ...]:
        task, steps, wanted = key
        return -runs[task], task, -steps, -1 if wanted is None else wanted

    keys = sorted({_key(row) for row in rows}, key=order)
    return [board for key in keys if (board := _board(rows, key)) is not None]


Key = tuple[str, int, int | None]
"""Task, steps, and the number of parameters that was aimed at, as `Board.parameters`."""


def _key(row: Row) -> Key:
    return row["task"], row["steps"], row.get("parameters", 0) if row["fields"] else None


def _board(rows: Sequence[Row], key: Key) -> Board | None:
    """One table; None where its rows choose no rate."""
    task, steps, wanted = key
    group = [row for row in rows if _key(row) == key]
    usual = _grid([row for row in rows if _key(row) == (task, steps, None)])
    if not (grid := _grid(group)):
        return None
    if wanted:
        has = {row["method"] for row in group}
        others = (row for row in rows if (row["task"], row["steps"]) == (task, steps) and row["method"] not in has)
        group += [row for row in others if near(row["trained"], wanted)]
    entries = {(r["method"], str(r["fields"])): Entry(r["method"], r["fields"], r.get("parameters")) for r in group}
    seeds = max((row["seed"] for row in group if row["phase"] == "final"), default=3)
    under = [Protocol(task, steps, seeds, factors) for factors in (grid, usual if wanted else grid)]
    return Board(under[0], list(entries.values()), wanted, under[1])


def _grid(group: Sequence[Row]) -> tuple[float, ...]:
    """The factors that every finished entry has run, and before any is finished all of them; without those by which
    the grid of some grew."""
    factors: dict[tuple[str, str], set[float]] = {}
    for r in group:
        if r["phase"] == "select" and not r.get("beyond"):
            factors.setdefault((r["method"], str(r["fields"])), set()).add(r["factor"])
    finished = {(r["method"], str(r["fields"])) for r in group if r["phase"] == "final"}
    common = [tried for entry, tried in factors.items() if entry in finished]
    return tuple(sorted(set.intersection(*common) if common else set().union(*factors.values())))
