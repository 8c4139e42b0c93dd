"""`lora-lite bench`: what adapters cost on this machine, against PEFT and the bare base."""

from __future__ import annotations

import json as json_module
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

import lora_lite as ll

from ._bench import Setting, chosen, read, setting_of, tokens, write
from ._console import Bar, clock, say, table

SECONDS = {"S4": 1.5, "M3": 3.0, "layer-8b": 60.0, "tiny": 0.05}
"""Rough seconds of one round at 512 tokens, all three models."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure speed and memory of the methods on this machine, against PEFT and against the bare base. Whether they
    learn is another command: lora-lite bench learn --help

    Rows that the JSON file holds already are not measured again, so a stopped run goes on where it was. A goal that a
    row misses is named, and the exit code is 1. With --device the shapes of Llama-3.2-1B and Llama-3.1-8B are timed
    there in bf16, eager and compiled.
    """

    aliases: ClassVar = ("size", "method")
    what: Annotated[Literal["speed", "memory"], tyro.conf.Positional] = "speed"
    """speed: forward, training step, one token, verbs and memory on a small Llama, or on one large layer; memory: the
    exact peak of a step at 512 and 4,096 tokens, beside PEFT's and what `ll.cost` states."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--method"])] = ("lora",)
    """Methods, `all` for every method that PEFT has too, or `every` for those besides that have no rival."""
    sizes: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--size"])] = ()
    """S4 (width 384, 4 layers; the default), M3 (width 768, 3 layers), layer-8b (one layer of an 8 B Llama: 8 GB of
    memory and a minute a round), tiny. With --device: llama-3.2-1b, llama-3.1-8b, tiny."""
    shapes: tuple[str, ...] = ()
    """Rows x tokens of a batch: 4x128, or 4x512 with --device cuda."""
    ranks: tuple[int, ...] = (8,)
    rounds: int = 9
    """Measured rounds, after one that warms up; at least 2."""
    threads: int = 1
    device: Literal["cpu", "cuda"] | None = None
    """Time forward, step and decoding at batch 1 and 64 on this device, in bf16: base, PEFT and ours, eager and
    compiled. `cpu` is for trying it out, with --size tiny."""
    modes: tuple[Literal["eager", "compiled"], ...] = ("eager", "compiled")
    """With --device: whether models run as they are, compiled by inductor, or both."""
    json: Path | None = None
    """Write the figures here, with versions; rows that are there already are kept."""
    table: Path | None = None
    """Write a markdown table here."""
    plot: Path | None = None
    """Draw a picture here (.png, .svg)."""
    dry_run: bool = False
    """Say what would be measured, and about how long it takes."""


def run(args: Bench) -> int:
    if args.what == "memory":
        from .bench_memory import run_on as run_memory

        return run_memory(args)
    if args.device is not None:
        from .bench_device import run_on

        return run_on(args)
    return run_timed(args)


def run_timed(args: Bench) -> int:
    """All rows of speed that the JSON file does not hold yet."""
    import torch

    from ..bench import goals, report, speed

    sizes, shapes = args.sizes or ("S4",), args.shapes or ("4x128",)
    todo = list(speed.settings(chosen(args, speed, sizes, shapes, speed.SIZES), sizes, shapes, args.ranks))
    data = read(args.json)
    known = {setting_of(row) for row in data["rows"]}
    rest = [s for s in todo if s not in known]
    if args.dry_run:
        seconds = sum(SECONDS[size] * tokens(shape) / 512 * (args.rounds + 4) for _, size, shape, _ in rest)
        rows = [(*setting, "known" if setting in known else "") for setting in todo]
        table(("method", "model", "tokens", "r", ""), rows, title=f"{len(rest)} rows, about {clock(seconds)}")
        return 0
    if not speed.has_peft():
        say("peft is not installed, so methods are timed against the bare base only: pip install peft")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    data["machine"] = speed.machine()
    try:
        with Bar("bench", len(rest) * (args.rounds + 2)) as bar:
            for setting in rest:
                data["rows"].append(one_row(speed, setting, args.rounds, bar.ticker(" ".join(map(str, setting)))))
                if args.json is not None:
                    write(args.json, json_module.dumps(data, indent=1) + "\n")
    finally:
        torch.set_num_threads(before)
    wanted = [row for row in data["rows"] if setting_of(row) in set(todo)]
    report_on(args, data, wanted, report)
    for sentence in (lacking := goals.missed(wanted)):
        say(f"missed: {sentence}")
    return 1 if lacking else 0


def one_row(speed: Any, setting: Setting, rounds: int, tick: Any) -> dict[str, Any]:
    """A measured row with its goals; where the method refuses this model, what it says."""
    from ..bench.goals import judged

    try:
        row = speed.measure(*setting, rounds, tick)
    except ll.LoraLiteError as e:
        return {**dict(zip(("method", "size", "shape", "r"), setting, strict=True)), "refused": str(e)}
    return {**row, "goals": judged(row)}


def report_on(args: Bench, data: dict[str, Any], wanted: list[dict[str, Any]], report: Any) -> None:
    """The wanted rows on the screen; tables and picture of all rows where they were asked for."""
    rows = [report.cells(row) for row in wanted]
    table(report.COLUMNS, [[c.replace("**", "") for c in row] for row in rows], title="medians [quartiles]")
    verbs = [report.verb_cells(row) for row in wanted if "ours_attach_ms" in row]
    if verbs:
        title = "milliseconds, ours : PEFT's"
        table(report.VERB_COLUMNS, [[c.replace("**", "") for c in row] for row in verbs], title=title)
    if args.table is not None:
        write(args.table, report.markdown(data))
    if args.plot is None:
        return
    if any("step_vs_peft" in r for r in data["rows"]):
        report.plot(data, args.plot)
    else:
        say("no row holds a comparison with PEFT, so there is nothing to draw.")
