"""`lora-lite bench --device`: absolute times on a GPU, unattended; the same run on the CPU for trying it out."""

from __future__ import annotations

import json
from typing import Any

import lora_lite as ll

from ._bench import chosen, read, write
from ._console import Bar, say, table

SIZES = {"cuda": ("llama-3.2-1b", "llama-3.1-8b"), "cpu": ("tiny",)}
SHAPES = {"cuda": ("4x512",), "cpu": ("2x8",)}


def run_on(args: Any) -> int:
    """All units of the run that the JSON file does not hold yet.

    Raises:
        ConfigError: the device is not here, an unknown size, or a picture, which this run does not draw.
    """
    from ..bench import device, speed

    assert args.device is not None
    if args.plot is not None:
        raise ll.ConfigError("--plot draws ratios to PEFT; with --device write --json or --table.")
    sizes, shapes = args.sizes or SIZES[args.device], args.shapes or SHAPES[args.device]
    every = device.units(chosen(args, speed, sizes, shapes, device.SIZES), sizes, shapes, args.ranks[0])
    todo = [unit for unit in every if unit.mode in args.modes]
    data = read(args.json)
    known = {device.key_of(row) for row in data["rows"] if "failed" not in row}
    rest = [unit for unit in todo if unit.key not in known]
    if args.dry_run:
        rows = [(*u.key, "known" if u.key in known else "") for u in todo]
        table(("who", "method", "mode", "model", "tokens", "r", ""), rows, title=f"{len(rest)} units to measure")
        return 0
    device.check_device(args.device)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    data["machine"] = device.machine(args.device)
    with Bar("bench", len(rest)) as bar:
        for i, unit in enumerate(rest):
            bar.update(i, " ".join(map(str, unit.key)))
            _keep(data, device.measure(unit, args.device, args.rounds), device)
            if args.json is not None:
                write(args.json, json.dumps(data, indent=1) + "\n")
    return _report(args, data, {u.key for u in todo}, device)


def _keep(data: dict[str, Any], row: dict[str, Any], device: Any) -> None:
    """Put a row in, in the place of one that failed."""
    others = [r for r in data["rows"] if device.key_of(r) != device.key_of(row)]
    data["rows"] = device.with_ratios([*others, row])


def _report(args: Any, data: dict[str, Any], wanted: set[Any], device: Any) -> int:
    rows = [row for row in data["rows"] if device.key_of(row) in wanted]
    table(device.COLUMNS, [device.cells(row) for row in rows], title="in brackets: over the base in the same mode")
    if args.table is not None:
        write(args.table, device.markdown(data))
    failed = [row for row in rows if "failed" in row]
    for row in failed:
        say(f"failed: {' '.join(map(str, device.key_of(row)))}: {row['failed']}")
    return 1 if failed else 0
