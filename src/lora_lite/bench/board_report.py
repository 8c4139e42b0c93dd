"""The leaderboard as a table, a page, pictures and one self-contained HTML report."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lora_lite as ll

from . import beside_peft
from . import board_words as words
from .board import Entry, Protocol, Row, Standing, standing, trainable
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


def ranked(rows: Sequence[Row], protocol: Protocol, entries: Iterable[Entry]) -> list[Standing]:
    """The entries that have begun, the best mean first."""
    found = [standing(rows, protocol, entry) for entry in entries]
    return sorted((s for s in found if s.rates), key=lambda s: -(s.mean if s.mean is not None else -1.0))


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
    """One table: what was run under one protocol, at default sizes or near one number of trained parameters."""

    protocol: Protocol
    entries: list[Entry]
    parameters: int | None
    """None: default sizes."""

    @property
    def name(self) -> str:
        """Task, steps and size, as a file's name has them."""
        size = "" if self.parameters is None else f"-{self.parameters}"
        return f"{self.protocol.task}-{self.protocol.steps}{size}"

    @property
    def columns(self) -> list[str]:
        """Those of the table; the recommended rate is outside the grid of a chosen size."""
        return [c for c in COLUMNS if self.parameters is None or c != OWN]

    def line(self, s: Standing) -> list[str]:
        return [cell for c, cell in zip(COLUMNS, cells(s), strict=True) if c in self.columns]

    @property
    def title(self) -> str:
        size = f"about {self.parameters:,} trained parameters" if self.parameters else "other sizes"
        size = "default sizes" if self.parameters is None else size
        return f"{self.protocol.task}, {self.protocol.steps} steps, {size}"


def boards(rows: Sequence[Row]) -> list[Board]:
    """Everything that the rows hold, default sizes first, then few parameters before many. On a board of one size a
    method whose default size comes near it stands with the runs of that."""
    groups: dict[tuple[str, int, int | None], list[Row]] = {}
    for row in rows:
        wanted = row.get("parameters", 0) if row["fields"] else None
        groups.setdefault((row["task"], row["steps"], wanted), []).append(row)
    found = []
    for (task, steps, wanted), group in sorted(groups.items(), key=lambda g: (g[0][0], -g[0][1], g[0][2] or -1)):
        entries = {(r["method"], str(r["fields"])): Entry(r["method"], r["fields"], wanted) for r in group}
        own = [r for r in groups.get((task, steps, None), ()) if wanted and near(r["trained"], wanted)]
        absent = {r["method"] for r in own} - {r["method"] for r in group}
        entries |= {(name, ""): Entry(name) for name in sorted(absent)}
        if grid := _grid(group):
            seeds = max((r["seed"] for r in (*group, *own) if r["phase"] == "final"), default=3)
            found.append(Board(Protocol(task, steps, seeds, grid), list(entries.values()), wanted))
    return found


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


def markdown(rows: Sequence[Row], beside: Sequence[Row] = ()) -> str:
    """The committed page. beside: rows of `beside_peft`."""
    lines = ["# Does it learn?", "", "Generated by `lora-lite bench learn --report` from one JSON row per run."]
    lines += ["The protocol:", "", *(f"- {point}" for point in words.protocol(rows))]
    for board in boards(rows):
        standings = ranked(rows, board.protocol, board.entries)
        finished = [s for s in standings if s.finals]
        lines += ["", f"## {board.title}", ""]
        if board.parameters:
            lines += [words.at_one_size(board.protocol), ""]
        lines += ["| " + " | ".join(board.columns) + " |", "|" + " --- |" * len(board.columns)]
        lines += ["| " + " | ".join(board.line(s)) + " |" for s in finished]
        if said := said_of(board, standings):
            lines += ["", "Read it so:", "", *(f"- {sentence}" for sentence in said)]
        if open_now := [s.entry.label for s in finished if len(s.finals) < board.protocol.seeds]:
            lines += ["", f"Not finished: {', '.join(open_now)}."]
        lines += (
            ["", *table] if (table := words.unchosen([s for s in standings if not s.finals], board.protocol)) else []
        )
        begun = {s.entry.method for s in standings}
        if board.parameters is None and (absent := [name for name in trainable() if name not in begun]):
            lines += ["", f"Not begun: {', '.join(absent)}."]
    return "\n".join([*lines, *beside_peft.markdown(list(beside))]) + "\n"


def said_of(board: Board, standings: Sequence[Standing]) -> list[str]:
    """How to read a board."""
    return [*(words.sizes_differ(standings) if board.parameters is None else []), *words.reading(standings)]


def write(folder: Path, rows: Sequence[Row], beside: Sequence[Row] = ()) -> list[Path]:
    """`learn.md`, pictures, and `learn.html` which needs no other file."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = [folder / "learn.md"]
    figures: list[tuple[str, Any]] = []
    if any("refused" not in row for row in beside):
        figures.append(("the same start here and in PEFT", beside_peft.picture(list(beside))))
        paths.append(folder / "learn-beside-peft.png")
        figures[0][1].savefig(paths[-1])
    for title, name, figure in drawn(rows):
        paths.append(folder / f"learn-{name}.png")
        figure.savefig(paths[-1])
        figures.append((title, figure))
    shown = [f"![{what}]({path.name})" for path, (what, _) in zip(paths[1:], figures, strict=True)]
    seen = [
        "",
        "## Pictures",
        "",
        "All of this in one page that needs no other file: [report](learn.html).",
        "",
        *shown,
    ]
    paths[0].write_text(markdown(rows, beside) + "\n".join(seen) + "\n", encoding="utf-8")
    page = folder / "learn.html"
    page.write_text(report(rows, figures, beside), encoding="utf-8")
    return [*paths, page]


def drawn(rows: Sequence[Row]) -> Iterator[tuple[str, str, Any]]:
    """(title, name of the file, figure) of every board, then of every task that ran at several sizes."""
    from .board_pictures import sizes

    at_size: dict[str, dict[int, list[Standing]]] = {}
    for board in boards(rows):
        standings = ranked(rows, board.protocol, board.entries)
        for what, figure in pictures(board, standings, rows):
            yield f"{board.title}: {what}", f"{board.name}-{what}", figure
        finished = [s for s in standings if s.mean is not None]
        if board.parameters and finished:
            at_size.setdefault(f"{board.protocol.task}-{board.protocol.steps}", {})[board.parameters] = finished
    for name, standings in at_size.items():
        if len(standings) > 1:
            yield f"{name.partition('-')[0]}: at equal trained parameters", f"{name}-sizes", sizes(standings)


def pictures(board: Board, standings: Sequence[Standing], rows: Sequence[Row]) -> list[tuple[str, Any]]:
    """(name, figure): accuracy against parameters and time, sensitivity to the rate, forgetting, loss curves; of a
    board of one size, time and sensitivity."""
    from .board_pictures import curves, pareto, sensitivity

    protocol = board.protocol
    finished = [s for s in standings if s.mean is not None]
    found = [("rates", sensitivity(standings))]
    if finished and board.parameters:
        return [*found, ("time", pareto(finished, "step_vs_lora", "a step over one of LoRA"))]
    own = [r for r in rows if (r["task"], r["steps"]) == (protocol.task, protocol.steps)]
    found.append(("curves", curves(standings, own)))
    if finished:
        found.append(("parameters", pareto(finished, "trained", "trained parameters")))
        found.append(("time", pareto(finished, "step_vs_lora", "a step over one of LoRA")))
        if any(s.forgotten is not None for s in finished):
            found.append(("forgetting", pareto(finished, "forgotten", "growth of the loss on the base's own text")))
    return found


def report(rows: Sequence[Row], figures: Sequence[tuple[str, Any]], beside: Sequence[Row] = ()) -> str:
    """One HTML page with the tables and the pictures inside."""
    body = [_list("The protocol", words.protocol(rows))]
    for board in boards(rows):
        standings = ranked(rows, board.protocol, board.entries)
        body.append(f"<h2>{html.escape(board.title)}</h2>")
        if board.parameters:
            body.append(f"<p>{html.escape(words.at_one_size(board.protocol))}</p>")
        body.append(_table(board.columns, [board.line(s) for s in standings]))
        if said := said_of(board, standings):
            body.append(_list("Read it so", said))
    if beside:
        body.append("<h2>Beside PEFT</h2>")
        body.append(_table(beside_peft.COLUMNS, [beside_peft.cells(r) for r in beside_peft.ordered(beside)]))
    for title, figure in figures:
        body.append(f'<figure><figcaption>{html.escape(title)}</figcaption><img alt="{html.escape(title)}" src="')
        body.append(_embedded(figure) + '"></figure>')
    return PAGE.replace("BODY", "\n".join(body))


def _list(title: str, points: Sequence[str]) -> str:
    return f"<h3>{title}</h3><ul>{''.join(f'<li>{html.escape(point)}</li>' for point in points)}</ul>"


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    found = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{found}</tbody></table></div>'


def _embedded(figure: Any) -> str:
    from PIL import Image

    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(64).save(buffer, "png", optimize=True)  # a third of the bytes
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>lora-lite: does it learn?</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 86rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } figure { margin: 2rem 0 } img { max-width: 100% }
figcaption { font-weight: 600 }
</style></head><body><h1>Does it learn?</h1>
BODY
</body></html>
"""
