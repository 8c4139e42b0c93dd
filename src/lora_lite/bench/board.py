"""The leaderboard: which runs are left, which rate a method is given, and what its runs say."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lora_lite as ll
from lora_lite.core.errors import FileError

from .learn import Setting

GRID = (1 / 3, 1.0, 3.0, 9.0)
"""The same factors on the recommended rate for every method."""
GRIDS = {"wordmath": (1.0, 3.0, 9.0, 27.0, 81.0)}
"""The grids of other tasks. Recommended rates are those of models thousands wide; the base of wordmath is 160 wide, and
the smaller the width, the larger the step that it bears."""
BEYOND = 2
"""Steps by which the grid grows, one at a time, at an end where the best rate stands: past it a better may lie."""
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % points of Student's t with 1, 2, ... degrees of freedom."""
LEARNT = 0.1
"""Share of right answers above which seeds scatter alike; near 0 they cannot."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A line of the leaderboard: a method, perhaps at another size than its default."""

    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    """The number of trained parameters that the size was chosen for."""

    @property
    def label(self) -> str:
        changes = ", ".join(f"{k}={v}" for k, v in self.fields.items())
        return f"{self.method} ({changes})" if changes else self.method


@dataclass(frozen=True)
class Protocol:
    """What is the same for all entries of a board."""

    task: str
    steps: int
    seeds: int = 3
    grid: tuple[float, ...] = GRID

    @property
    def beyond(self) -> tuple[float, ...]:
        """Factors past both ends of the grid, at the distance of the last two inside."""
        inside = sorted(self.grid)
        if len(inside) < 2:
            return ()
        down, up = inside[0] / inside[1], inside[-1] / inside[-2]
        below = (inside[0] * down**n for n in range(BEYOND, 0, -1))
        return (*below, *(inside[-1] * up**n for n in range(1, BEYOND + 1)))

    def factors(self, entry: Entry) -> dict[float, float]:
        """Rate, to three digits -> its factor on the recommended one, of the grid and beyond."""
        own = ll.get_variant(entry.method).lr
        return {float(f"{factor * own:.3g}"): factor for factor in sorted((*self.grid, *self.beyond))}

    def rates(self, entry: Entry) -> list[float]:
        """The rates of the grid."""
        by_factor = {factor: rate for rate, factor in self.factors(entry).items()}
        return [by_factor[factor] for factor in self.grid]

    def asked(self, entry: Entry, ranked: Sequence[float]) -> list[float]:
        """The rates that must run: those of the grid, and the next one past the best where it stands at an end. ranked:
        the rates that have run, the best first."""
        grid, every = self.rates(entry), list(self.factors(entry))
        if not set(grid) <= set(ranked):
            return grid
        here, run = every.index(ranked[0]), {every.index(rate) for rate in ranked}
        near = {here - 1, here + 1} & set(range(len(every))) if here in (min(run), max(run)) else set[int]()
        return [*(every[i] for i in sorted(run)), *(every[i] for i in sorted(near - run))]

    def selections(self, entry: Entry, ranked: Sequence[float] = ()) -> list[Setting]:
        """One run per rate, with seed 0, judged on validation questions."""
        return [self.setting(entry, "select", 0, lr) for lr in self.asked(entry, ranked)]

    def place(self, setting: Setting) -> dict[str, Any]:
        """What a row says of its rate: the factor on the recommended one, and whether it lies beyond the grid."""
        factor = self.factors(Entry(setting.method))[setting.lr]
        return {"factor": factor} if factor in self.grid else {"factor": factor, "beyond": True}

    def finals(self, entry: Entry, lr: float) -> list[Setting]:
        """The runs that count: seeds 1, 2, ..., at the chosen rate, judged on the test."""
        return [self.setting(entry, "final", seed, lr) for seed in range(1, self.seeds + 1)]

    def setting(self, entry: Entry, phase: Any, seed: int, lr: float) -> Setting:
        return Setting(self.task, entry.method, phase, seed, lr, self.steps, dict(entry.fields))


@dataclass(frozen=True)
class Standing:
    """What the runs of one entry say so far."""

    entry: Entry
    rates: dict[float, float]
    """Rate -> share of right validation answers, of the rates that have run, the best first."""
    chosen: float | None
    """The rate of the final runs; None until the grid has run, and what lies past a best rate at its end."""
    finals: list[Row]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the final runs."""
        return tuple(sorted(r["seed"] for r in self.finals))

    @property
    def mean(self) -> float | None:
        return statistics.fmean(r["accuracy"] for r in self.finals) if self.finals else None

    @property
    def half(self) -> float | None:
        """Half the 95 % interval of the mean over seeds, by Student's t; None below two seeds."""
        n = len(self.finals)
        if n < 2:
            return None
        spread = statistics.stdev(r["accuracy"] for r in self.finals)
        return (STUDENT[n - 2] if n - 2 < len(STUDENT) else 1.96) * spread / math.sqrt(n)

    def average(self, key: str) -> float | None:
        """Mean of a figure over the final runs that have it."""
        found = [r[key] for r in self.finals if r.get(key) is not None]
        return statistics.fmean(found) if found else None

    @property
    def forgotten(self) -> float | None:
        """By how much the loss on the base's own text grew."""
        found = [r["remembered"] for r in self.finals if r.get("remembered")]
        grown = [f["after"] - f["before"] for f in found if None not in f.values()]
        return statistics.fmean(grown) if grown else None


FREE = 4
"""Degrees of freedom below which nothing is said of chance."""


@dataclass(frozen=True)
class Scatter:
    """How much of a difference between two entries is chance, as far as seeds tell."""

    standings: list[Standing]
    """The E entries that learnt something and have run all n seeds, the same."""
    seeds: int
    """n."""
    sigma: float
    """Standard deviation of one final run, σ."""

    @property
    def free(self) -> int:
        """Degrees of freedom of σ, (E − 1)(n − 1)."""
        return (len(self.standings) - 1) * (self.seeds - 1)

    def apart(self, comparisons: int = 1, runs: int | None = None) -> float:
        """By how much two means of so many runs (None: n) differ at most by chance, in 95 % of the cases where nothing
        else makes a difference, and in none of so many `comparisons` (Bonferroni): t σ √(2 / runs)."""
        return student(1 - 0.025 / comparisons, self.free) * self.sigma * math.sqrt(2 / (runs or self.seeds))


def student(p: float, free: int) -> float:
    """The p-quantile of Student's t by its expansion around the normal one (Cornish and Fisher): at 0.975 within half
    a percent from 4 degrees of freedom on."""
    z = statistics.NormalDist().inv_cdf(p)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / free + second / free**2 + third / free**3


def scatter(standings: Iterable[Standing]) -> Scatter | None:
    """Over entries that learnt something. Seed i gives all of them the same rows, so what it does to all, ā_i − ā, is
    no difference between them: σ² = Σ_e Σ_i (a_ei − ā_e − ā_i + ā)² / ((E − 1)(n − 1)). None below `FREE` degrees of
    freedom.
    """
    learnt = [s for s in standings if (s.mean or 0.0) > LEARNT]
    seeds = max((s.seeds for s in learnt), key=len, default=())
    whole = [s for s in learnt if s.seeds == seeds]
    n = len(seeds)
    if (len(whole) - 1) * (n - 1) < FREE:
        return None
    table = [[r["accuracy"] for r in sorted(s.finals, key=by_seed)] for s in whole]
    means = [statistics.fmean(runs) for runs in table]
    mean = statistics.fmean(means)
    shift = [statistics.fmean(runs[i] for runs in table) - mean for i in range(n)]
    squares = ((a - own - shift[i]) ** 2 for runs, own in zip(table, means, strict=True) for i, a in enumerate(runs))
    return Scatter(whole, n, math.sqrt(sum(squares) / ((len(whole) - 1) * (n - 1))))


def by_seed(row: Row) -> int:
    return row["seed"]


def aim(setting: Setting, entries: Iterable[Entry]) -> dict[str, Any]:
    """What a row says of a size that was chosen: the number of parameters that it comes near."""
    found = (e.parameters for e in entries if (e.method, e.fields) == (setting.method, setting.fields))
    return {"parameters": wanted} if (wanted := next(found, None)) is not None else {}


def trainable() -> list[str]:
    """Methods that train, start from nothing but the base and rows, and by default stand on linear layers or the
    residual stream."""
    usual = [v for v in ll.variants() if ll.Variant.site in v.config().target_kinds]
    return [v.name for v in usual if v.trains and v.holds != "modules" and v.needs_data != "adapters"]


def read(path: Path) -> list[Row]:
    """The finished runs of a file, one JSON object per line; a last line that was cut by a stop is passed over.

    Raises:
        FileError: the file holds something else.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            Setting.of(row)
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise FileError(
                f"{path}:{number} is no row of `lora-lite bench learn`; give another file, or remove the line."
            ) from None
        rows.append(row)
    return rows


def add(path: Path, row: Row) -> None:
    """Append one finished run; after a line that was cut, on a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    kept = "".join(json.dumps(r) + "\n" for r in read(path)) if cut else None
    if kept is not None:
        path.write_text(kept, encoding="utf-8")
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")


def standing(rows: Iterable[Row], protocol: Protocol, entry: Entry) -> Standing:
    """What the rows say of one entry under this protocol; rows of another one do not count."""
    known = {Setting.of(row).key: row for row in rows if row["method"] == entry.method}
    every = (protocol.setting(entry, "select", 0, lr) for lr in protocol.factors(entry))
    selected = [known[s.key] for s in every if s.key in known]
    ranked = sorted(selected, key=lambda r: (-r["accuracy"], math.inf if r["loss"] is None else r["loss"]))
    rates = [row["lr"] for row in ranked]
    left = set(protocol.asked(entry, rates)) - set(rates)
    chosen = None if left else rates[0]
    finals = [known[s.key] for s in protocol.finals(entry, chosen) if s.key in known] if chosen is not None else []
    return Standing(entry, {row["lr"]: row["accuracy"] for row in ranked}, chosen, finals)


def left(rows: Sequence[Row], protocol: Protocol, entries: Sequence[Entry]) -> list[Setting]:
    """The runs that can start now and are not finished: rates first, finals of an entry once its rate is chosen."""
    finished = {Setting.of(row).key for row in rows}
    todo: dict[str, Setting] = {}
    for entry in entries:
        now = standing(rows, protocol, entry)
        chosen = now.chosen
        settings = protocol.selections(entry, list(now.rates)) if chosen is None else protocol.finals(entry, chosen)
        todo |= {s.key: s for s in settings if s.key not in finished}
    return list(todo.values())


def count_left(rows: Sequence[Row], protocol: Protocol, entries: Sequence[Entry]) -> int:
    """All runs that are left, those included whose rate is not chosen yet."""
    total = 0
    for entry in entries:
        now = standing(rows, protocol, entry)
        total += len(set(protocol.asked(entry, list(now.rates))) - now.rates.keys()) + protocol.seeds - len(now.finals)
    return total
