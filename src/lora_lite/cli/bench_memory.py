"""`lora-lite bench memory`: the peak of a training step, against PEFT and against what is stated on paper."""

from __future__ import annotations

import json
from typing import Any

import lora_lite as ll

from ._bench import chosen, read, setting_of, write
from ._console import Bar, markdown, say, table

SHAPES = ("1x512", "1x4096")
SIZES = ("M3",)
MORE = 1.05
"""Of what is stated: above it a row is missed."""
HEAD = """# Peak memory of a training step

Forward and backward of one batch, on tensors without values: every storage is counted from the operation that makes it
until nothing refers to it (`lora-lite bench memory`), which gives the same figure on every machine; on real tensors it
is the sum that torch's profiler shows. MB at the peak beyond the bare base's own, weights and adapter apart: with all
activations kept, and with the blocks' recomputed (gradient checkpointing). Of paper: the whole peak over the base's own
and what `ll.cost` states beyond it, with the gradients. S4 is a Llama of width 384 with 4 blocks, M3 of 768 with 3.
0.0 where the peak lies elsewhere, at the loss. Nothing under PEFT:
it has no such method, or its step asks for values. To go on with others: `lora-lite bench memory --methods all --json
benchmarks/results/memory.json --table docs/results/memory.md`.
"""


def run_on(args: Any) -> int:
    """All rows that the JSON file does not hold yet.

    Raises:
        ConfigError: an unknown method, size or shape, a picture, which this run does not draw, or a device.
    """
    from ..bench import memory, speed

    if args.plot is not None:
        raise ll.ConfigError("--plot draws ratios of time to PEFT; of memory write --json or --table.")
    if args.device is not None:
        raise ll.ConfigError("bench memory counts without a device: leave out --device.")
    sizes, shapes = args.sizes or SIZES, args.shapes or SHAPES
    todo = list(speed.settings(chosen(args, speed, sizes, shapes, speed.SIZES), sizes, shapes, args.ranks))
    data = read(args.json)
    known = {setting_of(row) for row in data["rows"]}
    rest = [setting for setting in todo if setting not in known]
    if args.dry_run:
        rows = [(*setting, "known" if setting in known else "") for setting in todo]
        table(("method", "model", "tokens", "r", ""), rows, title=f"{len(rest)} rows, some 20 seconds each")
        return 0
    import transformers

    transformers.utils.logging.set_verbosity_error()
    data["machine"] = speed.machine()
    with Bar("bench", len(rest)) as bar:
        for i, (method, size, shape, r) in enumerate(rest):
            bar.update(i, f"{method} {size} {shape}")
            rows, _, length = shape.partition("x")
            try:
                data["rows"].append(memory.measure(method, size, int(rows), int(length), r))
            except ll.LoraLiteError as e:
                say(f"left out: {method} {size} {shape}: {e}")
                continue
            if args.json is not None:
                write(args.json, json.dumps(data, indent=1) + "\n")
    return _report(args, data, set(todo), memory)


def _report(args: Any, data: dict[str, Any], wanted: set[Any], memory: Any) -> int:
    rows = [row for row in data["rows"] if setting_of(row) in wanted]
    table(memory.COLUMNS, [memory.cells(row) for row in rows], title="MB at the peak beyond the bare base's")
    if args.table is not None:
        versions = ", ".join(
            f"{k} {data['machine'][k]}" for k in ("torch", "transformers", "peft") if k in data["machine"]
        )
        ordered = sorted(data["rows"], key=lambda row: (row["size"], len(row["shape"]), row["shape"]))
        body = markdown(memory.COLUMNS, [memory.cells(row) for row in ordered])
        write(args.table, f"{HEAD}\n{versions}.\n\n{body}\n")
    missed = [(row, mode) for row in rows for mode in memory.MODES if memory.of_paper(row[mode]) > MORE]
    for row, mode in missed:
        of = memory.of_paper(row[mode])
        say(f"missed: {row['method']} {row['shape']}, {mode}: {of:.2f} of what is stated, at most {MORE} wanted")
    return 1 if missed else 0
