"""`lora-lite bench learn --beside-peft`: loss curves of ours and of PEFT's from one start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll

from ._console import Bar, clock, say, table

STEPS = 60
"""Enough for curves to part that will."""


def place(results: Path) -> Path:
    """Where these rows are kept: beside the board's."""
    return results.with_name(f"{results.stem}-beside-peft.jsonl")


def read_beside(results: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    path = place(results)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def asked(args: Any) -> tuple[tuple[str, ...], int]:
    """The methods and the number of steps.

    Raises:
        ConfigError: a method that PEFT does not have, no PEFT, or no steps.
    """
    from ..bench import beside_peft
    from ..core.errors import did_you_mean

    names = beside_peft.METHODS if "all" in args.methods else args.methods
    for name in names:
        if name not in beside_peft.METHODS:
            raise ll.ConfigError(
                f"--methods {name}: not compared with PEFT.{did_you_mean(name, beside_peft.METHODS)} Choose from: all, "
                f"{', '.join(beside_peft.METHODS)}."
            )
    if not beside_peft.has_peft():
        raise ll.ConfigError("--beside-peft needs PEFT: pip install peft")
    steps = STEPS if args.steps is None else args.steps
    if steps < 1:
        raise ll.ConfigError(f"--steps must be at least 1, got {steps}.")
    return names, steps


def run_beside(args: Any, load: Callable[[], Any], guess: float) -> int:
    """Compare what is not compared yet; a method with other steps or on another task is another row. `load` gives the
    task, whose step takes about `guess` seconds.

    Raises:
        ConfigError: as `asked`.
    """
    from ..bench import beside_peft

    names, steps = asked(args)
    rows = read_beside(args.results)
    known = {(r["method"], r["task"], r["steps"]) for r in rows}
    todo = [name for name in names if (name, args.task, steps) not in known]
    if args.dry_run:
        seconds = 2 * steps * guess * len(todo)
        table(("method", ""), [(n, "" if n in todo else "known") for n in names], title=f"about {clock(seconds)}")
        return 0
    the_task = load() if todo else None
    path = place(args.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    with Bar("beside PEFT", steps * len(todo)) as bar:
        for i, name in enumerate(todo):
            assert the_task is not None
            row = beside_peft.run(
                the_task, name, steps, tick=lambda done, _, i=i, name=name: bar.update(i * steps + done, name)
            )
            rows.append(row)
            with path.open("a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
    wanted = [r for r in rows if r["method"] in names and (r["task"], r["steps"]) == (args.task, steps)]
    table(beside_peft.COLUMNS, [beside_peft.cells(row) for row in wanted])
    say(f"rows     {path}")
    if args.report is not None:
        from ..bench import board
        from ..bench.board_report import write

        for written in write(args.report, board.read(args.results), rows):
            say(f"wrote    {written}")
    return 0
