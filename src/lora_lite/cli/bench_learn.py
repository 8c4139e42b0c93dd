"""`lora-lite bench learn`: which methods learn, at which rate, how surely, and at what price."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lora_lite as ll

from ._console import LiveTable, clock, say, table

if TYPE_CHECKING:
    from ..bench.board import Entry, Protocol, Row
    from ..bench.learn import Setting, Task

TASKS = ("wordmath", "glosses", "metamath")
STEPS = {"wordmath": 200, "glosses": 375, "metamath": 5000}
SHORT = ("method", "accuracy", "95 %", "seeds", "lr", "test loss")
"""Columns of the live table."""
REFRESH = 5.0
"""Seconds after which it says again how long the runs take."""
GUESS = {"wordmath": 0.25, "glosses": 1.0, "metamath": 2.0}
"""Seconds of a step before any run has been timed."""


@dataclass(frozen=True, kw_only=True)
class Learn:
    """Train methods on a task under one protocol, and rank them with their uncertainty.

    Every method gets the same steps on the same rows in the same order, which the seed decides. Its rate is chosen
    from the same grid around its recommended one, which grows where the best stands at its end, on validation
    questions; then seeds 1, 2, ... run at that rate and answer the test. Finished runs are kept in --results and
    never repeated; an interrupted one goes on from its last checkpoint.
    """

    task: Literal["wordmath", "glosses", "metamath"] = "wordmath"
    """wordmath (the bundled base), glosses (a real sentence encoder and WordNet), metamath (any causal model, GSM8K; a
    GPU is needed)."""
    methods: tuple[str, ...] = ("lora",)
    """Methods, or `all` for every one that trains."""
    parameters: tuple[int, ...] = ()
    """Run the methods at these numbers of trained parameters instead of their default sizes, such as 20000 120000."""
    steps: int | None = None
    """Optimiser steps of every run; None: 200 of wordmath, 375 of glosses, 5,000 of metamath."""
    seeds: int = 3
    """Final runs of each method."""
    grid: tuple[float, ...] = ()
    """Factors on each method's recommended rate; none given: 1/3 1 3 9, and 1 3 9 27 81 of wordmath, whose base is
    small."""
    jobs: int = 1
    """Processes side by side, one thread each."""
    device: Literal["cpu", "cuda"] | None = None
    """Where the runs happen; None: cuda for metamath where there is one, else cpu."""
    base: str | None = None
    """Another base for glosses and metamath: a folder or hub id."""
    data: str | None = None
    """Training data of metamath (hub id or file), or WordNet's data.noun for glosses."""
    test_data: str | None = None
    """Test data of metamath: a hub id, or a file with question and answer."""
    results: Path = Path("benchmarks/results/learn.jsonl")
    """One JSON object per finished run, appended; those of --beside-peft stand in a file beside it."""
    checkpoints: Path = Path("runs/learn")
    """Folder for the checkpoints of runs that are under way."""
    beside_peft: bool = False
    """Instead of the board: train each method here and in PEFT from one start on the same rows, and compare the losses
    step by step. `all`: every method that both have."""
    report: Path | None = None
    """Write a page, pictures and a self-contained HTML report into this folder."""
    limit: float | None = None
    """Start no run after so many minutes."""
    dry_run: bool = False
    """Say which runs are left and about how long they take."""


def main(words: list[str]) -> int:
    """`lora-lite bench learn` with these flags."""
    import tyro

    from ._words import check_words

    words = check_words("bench learn", Learn, words)
    return run(tyro.cli(Learn, prog="lora-lite bench learn", args=words, config=(tyro.conf.FlagCreatePairsOff,)))


def run(args: Learn) -> int:
    if args.beside_peft:
        from .bench_beside import run_beside

        return run_beside(args, lambda: task(args), GUESS[args.task])
    check(args)
    from ..bench import board

    grid = args.grid or board.GRIDS.get(args.task, board.GRID)
    protocol = board.Protocol(args.task, args.steps or STEPS[args.task], args.seeds, grid)
    rows = board.read(args.results)
    entries = chosen(args)
    if args.dry_run:
        preview(args, rows, protocol, entries)
        return 0
    try:
        failed = work(args, rows, protocol, entries)
    finally:
        rows = board.read(args.results)
        show(rows, protocol, entries)
    if args.report is not None:
        from ..bench.board_report import write
        from .bench_beside import read_beside

        for path in write(args.report, rows, read_beside(args.results)):
            say(f"wrote    {path}")
    return 1 if failed else 0


def check(args: Learn) -> None:
    """Values that no later step would catch with a good sentence."""
    from ..bench.board import trainable
    from ..core.errors import did_you_mean

    known = trainable()
    for name in args.methods:
        if name != "all" and name not in known:
            raise ll.ConfigError(
                f"--methods {name}: no method of that name trains.{did_you_mean(name, known)} Choose from: all, "
                f"{', '.join(known)}."
            )
    for flag, value in (
        ("--steps", 1 if args.steps is None else args.steps),
        ("--seeds", args.seeds),
        ("--jobs", args.jobs),
    ):
        if value < 1:
            raise ll.ConfigError(f"{flag} must be at least 1, got {value}.")
    if min(args.parameters, default=1) < 1:
        raise ll.ConfigError(f"--parameters needs numbers of at least 1, got {min(args.parameters)}.")
    if args.device == "cuda":
        from ..bench.device import check_device

        check_device("cuda")
    if min(args.grid, default=1) <= 0 or len(set(args.grid)) < len(args.grid):
        raise ll.ConfigError(f"--grid needs different factors above 0, got {args.grid}.")


def chosen(args: Learn) -> list[Entry]:
    """The lines of the board; a method that cannot reach a size is said and left out."""
    from ..bench.board import Entry, trainable
    from ..bench.sizes import fields_for

    names = trainable() if "all" in args.methods else list(args.methods)
    if not args.parameters:
        return [Entry(name) for name in names]
    the_task = task(args)
    model, entries = the_task.load(), []
    for wanted in args.parameters:
        for name in names:
            fields = fields_for(model, name, wanted, the_task.fields)
            if fields is None:
                say(f"{name} has no size near {wanted:,} trained parameters")
            elif all((e.method, e.fields) != (name, fields) for e in entries):
                entries.append(Entry(name, fields, wanted if fields else None))
    return entries


def task(args: Learn) -> Task:
    """The task that the flags describe.

    Raises:
        FileError: its model or data cannot be found.
    """
    if args.task == "wordmath":
        from ..demo.learning import WordMath

        return WordMath()
    if args.task == "glosses":
        from ..demo.glosses import Glosses

        return Glosses(args.base, args.data)
    from ..demo.metamath import MetaMath

    return MetaMath(args.base, args.data, args.test_data)


def preview(args: Learn, rows: list[Row], protocol: Protocol, entries: list[Entry]) -> None:
    from ..bench import board

    lines, seconds = [], 0.0
    for entry in entries:
        n = board.count_left(rows, protocol, [entry])
        each = step_seconds(rows, protocol, entry) * protocol.steps
        seconds += n * each
        lines.append((entry.label, n, " ".join(f"{lr:g}" for lr in protocol.rates(entry)), clock(n * each)))
    title = f"{sum(line[1] for line in lines)} runs, about {clock(seconds / args.jobs)} with {args.jobs} processes"
    table(("method", "runs left", "rates", "about"), lines, title=title)


def step_seconds(rows: list[Row], protocol: Protocol, entry: Entry) -> float:
    """Seconds of a step: as measured for the method, else for any method of the task, else a guess."""
    found = [r for r in rows if r["task"] == protocol.task]
    own = [r for r in found if r["method"] == entry.method] or found
    return sum(r["ms_per_step"] for r in own) / len(own) / 1000 if own else GUESS[protocol.task]


def work(args: Learn, rows: list[Row], protocol: Protocol, entries: list[Entry]) -> int:
    """Run what is left, and return how many runs failed; rows are written by this process alone, as they come in."""
    from ..bench import board

    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that start now
    start, failed = time.monotonic(), set[str]()
    idle = [worker() for _ in range(args.jobs)]
    running: dict[Future[Any], tuple[Setting, ProcessPoolExecutor]] = {}
    total = board.count_left(rows, protocol, entries)
    if not total:
        say("every run is finished already")
    began: dict[str, float] = {}
    try:
        with LiveTable(SHORT) as live:
            while True:
                busy = failed | {setting.key for setting, _ in running.values()}
                late = args.limit is not None and time.monotonic() - start > 60 * args.limit
                waiting = [] if late else [s for s in board.left(rows, protocol, entries) if s.key not in busy]
                for setting in waiting[: len(idle)]:
                    pool = idle.pop()
                    began[setting.key] = time.monotonic()
                    running[pool.submit(one, args, setting)] = setting, pool
                if not running:
                    return len(failed)
                left = board.count_left(rows, protocol, entries)
                now = [(s, time.monotonic() - began[s.key]) for s, _ in running.values()]
                live.update(short(rows, protocol, entries), standing_title(total - left, total, now))
                for done in wait(running, timeout=REFRESH, return_when=FIRST_COMPLETED).done:
                    setting, pool = running.pop(done)
                    idle.append(worker() if isinstance(done.exception(), BrokenProcessPool) else pool)
                    row = outcome(done, setting, live)
                    if row is None:
                        failed.add(setting.key)
                        continue
                    row |= protocol.place(setting) | board.aim(setting, entries)
                    board.add(args.results, row)
                    rows.append(row)
                    tell(row, total - board.count_left(rows, protocol, entries), total, live)
    finally:
        for pool in [*idle, *(pool for _, pool in running.values())]:
            pool.shutdown(wait=False, cancel_futures=True)


def short(rows: list[Row], protocol: Protocol, entries: list[Entry]) -> list[list[str]]:
    """The lines of the live table, the best first."""
    from ..bench import boards

    standings = boards.in_order(boards.begun(rows, protocol, entries))
    wanted = [boards.COLUMNS.index(name) for name in SHORT]
    return [[cells[i] for i in wanted] for cells in (boards.cells(s) for s in standings)]


def standing_title(done: int, total: int, now: list[tuple[Setting, float]]) -> str:
    """How far it is, and what runs since when."""
    runs = ", ".join(f"{s.method} lr {s.lr:g} {s.phase} {s.seed} ({clock(took)})" for s, took in now)
    return f"{done} of {total} runs; now {runs}"


def worker() -> ProcessPoolExecutor:
    """A process that runs one setting after another, and reads the task's rows once."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=leave_with, initargs=(os.getpid(),))


def leave_with(parent: int) -> None:
    """End this worker, in the middle of a run too, once the command is gone: it may be killed, and nobody would read
    the row."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


_TASK: dict[str, Task] = {}
"""The task of this worker."""


def one(args: Learn, setting: Setting) -> dict[str, Any]:
    """One run, in a worker."""
    import torch
    import transformers

    from ..bench.learn import run as run_one

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.task not in _TASK:
        _TASK[args.task] = task(args)
    return run_one(_TASK[args.task], setting, args.checkpoints, device=device(args))


def device(args: Learn) -> str:
    """The device of the runs."""
    import torch

    return args.device or ("cuda" if args.task == "metamath" and torch.cuda.is_available() else "cpu")


def outcome(done: Future[Any], setting: Setting, live: LiveTable) -> Row | None:
    """The finished row; a run that fails is said, and the others go on."""
    error = done.exception()
    if error is None:
        return done.result()
    kind = "" if isinstance(error, ll.LoraLiteError) else f"{type(error).__name__}: "
    live.say(f"{setting.method} at {setting.lr:g}: {kind}{error}", "yellow")
    return None


def tell(row: Row, done: int, total: int, live: LiveTable) -> None:
    what = f"seed {row['seed']}" if row["phase"] == "final" else "choosing the rate"
    live.say(
        f"{done}/{total}  {row['method']:<12} lr {row['lr']:<8g} {what:<18} {row['split']} {row['accuracy']:.1%}, loss "
        f"{row['loss'] if row['loss'] is not None else 'not finite'}, {row['ms_per_step']:.0f} ms a step"
    )


def show(rows: list[Row], protocol: Protocol, entries: list[Entry]) -> None:
    from ..bench import boards

    standings = boards.in_order(boards.begun(rows, protocol, entries))
    table(boards.COLUMNS, [boards.cells(s) for s in standings])
