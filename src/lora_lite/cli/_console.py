"""What the commands print: tables and bars on a terminal, plain lines without control codes everywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TextIO

QUIET = 2.0
"""Seconds for which long work stays silent."""
EVERY = 10.0
"""Seconds between the lines of a log."""
WIDE = 130
"""Columns in which a bar and the figures of a training step stand on one line."""
BAR = 30
"""Columns of a bar."""


def is_first() -> bool:
    """Whether this is the process that speaks, of those that `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"


class Diverted:
    """Whether lines for people go to stderr, since stdout is for one JSON object."""

    on = False


def divert(on: bool) -> None:
    """Send lines for people to stderr, or to stdout again."""
    Diverted.on = on


def stream() -> TextIO:
    """Where lines for people go."""
    return sys.stderr if Diverted.on else sys.stdout


def say(text: str = "", style: str = "") -> None:
    """One paragraph; `style` acts on a terminal only."""
    if not is_first():
        return
    if stream().isatty():
        from rich.console import Console

        Console(file=stream()).print(text, style=style or None, markup=False, highlight=False)
    else:
        print(text, file=stream(), flush=True)


def styled(pieces: Sequence[tuple[str, str]]) -> None:
    """Text of several styles, as one paragraph."""
    if stream().isatty() and is_first():
        from rich.console import Console
        from rich.text import Text

        Console(file=stream()).print(Text.assemble(*pieces))
    else:
        say("".join(text for text, _ in pieces))


def complain(text: str) -> None:
    """An error on stderr: one red sentence."""
    if sys.stderr.isatty():
        from rich.console import Console

        Console(stderr=True).print(text, style="red", markup=False, highlight=False)
    else:
        print(text, file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """A table; columns whose cells are all numbers are set to the right."""
    if not is_first():
        return
    cells = [[str(c) for c in row] for row in rows]
    right = [bool(cells) and all(_numeric(row[i]) for row in cells) for i in range(len(columns))]
    if stream().isatty():
        _rich_table(columns, cells, right, title)
        return
    lines = [list(columns), *cells]
    widths = [max(len(row[i]) for row in lines) for i in range(len(columns))]
    if title:
        print(title, file=stream())
    for row in lines:
        line = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        print("  ".join(line).rstrip(), file=stream())
    stream().flush()


def _rich_table(columns: Sequence[str], cells: list[list[str]], right: list[bool], title: str) -> None:
    from rich.console import Console

    Console(file=stream()).print(_grid(columns, cells, right, title))


def _grid(columns: Sequence[str], cells: list[list[str]], right: list[bool], title: str) -> Any:
    from rich import box
    from rich.table import Table

    grid = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, (name, r) in enumerate(zip(columns, right, strict=True)):
        grid.add_column(name, justify="right" if r else "left", overflow="fold", no_wrap=i == 0)
    for row in cells:
        grid.add_row(*(_escape(c) for c in row))
    return grid


class LiveTable:
    """A table that is drawn anew in its place, on a terminal; elsewhere only what is said."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = columns
        self.live: Any = None

    def __enter__(self) -> LiveTable:
        if stream().isatty() and is_first():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(file=stream()), transient=True, auto_refresh=False)
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str, style: str = "") -> None:
        """A line above the table."""
        if self.live is None:
            say(text, style)
        else:
            self.live.console.print(text, style=style or None, markup=False, highlight=False)

    def update(self, rows: Sequence[Sequence[object]], title: str) -> None:
        """What the table holds now."""
        if self.live is not None:
            cells = [[str(c) for c in row] for row in rows]
            right = [bool(cells) and all(_numeric(row[i]) for row in cells) for i in range(len(self.columns))]
            self.live.update(_grid(self.columns, cells, right, title), refresh=True)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The same as a markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in rows]
    return "\n".join(lines)


class Bar:
    """Progress of known length, on stderr: silent for two seconds; then a bar with the time left, or a line every ten
    seconds.

    with Bar("training", 300) as bar:
        bar.update(12, "loss 1.20")
    """

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, max(1, total)
        self.tty = sys.stderr.isatty()
        self.speaks = is_first()
        self.start = self.last = time.monotonic()
        self.first = self.done = 0
        self.rich: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self.rich is not None:
            self.rich.stop()

    def begin_at(self, done: int) -> None:
        """The work begins now, with so much of it done in an earlier run: neither that nor the time before counts."""
        self.first, self.start = done, time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if not self.speaks or (now - self.start < QUIET and self.rich is None):
            return
        if self.tty:
            self._bar(done, note)
        elif now - self.last >= EVERY:
            self.last = now
            rate = (done - self.first) / (now - self.start)
            left = f", {clock((self.total - done) / rate)} left" if rate > 0 else ""
            print(
                f"{self.what}: {done}/{self.total}{left}{', ' + note if note else ''}",
                file=sys.stderr,
                flush=True,
            )

    def remark(self, text: str) -> None:
        """In the place of the figures until the next ones come, or on a line of its own."""
        if self.rich is not None:
            self.rich.update(self.task, note=text)
        elif self.speaks:
            print(text, file=sys.stderr, flush=True)

    def ticker(self, note: str) -> Callable[[], None]:
        """For work that reports every step alike: a function that counts on from the last one's steps."""

        def tick() -> None:
            self.done += 1
            self.update(self.done, note)

        return tick

    def hook(self, done: int, total: int) -> None:
        """The same for functions that report (done, total)."""
        self.total = max(1, total)
        self.update(done)

    def _bar(self, done: int, note: str) -> None:
        if self.rich is None:
            self.rich = live_bar()
            self.rich.start()
            self.task = self.rich.add_task(self.what, total=self.total, note=note)
        self.rich.update(self.task, completed=done, total=self.total, note=note)


def live_bar() -> Any:
    """rich's progress with a note: on the same line where the terminal is wide enough, else on a line beneath."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    console = Console(stderr=True)
    beneath = console.width < WIDE

    class Noted(Progress):
        def get_renderables(self) -> Any:
            yield self.make_tasks_table(self.tasks)
            if beneath and self.tasks:
                yield Text(self.tasks[-1].fields["note"], no_wrap=True, overflow="ellipsis")

    columns = [TextColumn("{task.description}"), BarColumn(BAR), MofNCompleteColumn(), TimeRemainingColumn()]
    note = [] if beneath else [TextColumn("{task.fields[note]}")]
    return Noted(*columns, *note, console=console, transient=True)


def clock(seconds: float) -> str:
    """Such as `42 s`, `3 min 20 s`, `1 h 05 min`."""
    s = max(0, round(seconds))
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"


def _numeric(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").replace("%", "").replace("-", "").replace("e", "").isdigit()


def _escape(cell: str) -> str:
    from rich.markup import escape

    return escape(cell)
