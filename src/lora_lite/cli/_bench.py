"""What the benchmarks of speed share: the words of a command line, and the file that a run goes on from."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Any

import lora_lite as ll

Words = tuple[str, ...]
Setting = tuple[str, str, str, int]
"""Method, size, tokens, rank of a row."""


def setting_of(row: dict[str, Any]) -> Setting:
    return row["method"], row["size"], row["shape"], row["r"]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def chosen(args: Any, speed: Any, sizes: Words, shapes: Words, known: Any) -> Words:
    """The methods to time at `sizes`, which must be among the known ones, and `shapes`.

    Raises:
        ConfigError: an unknown method, size or shape, or fewer than two rounds.
    """
    from ..core.errors import did_you_mean

    names = tuple(speed.PAIRS) if "all" in args.methods else args.methods
    names = tuple(speed.methods()) if "every" in args.methods else names
    for name in names:
        if name not in speed.methods():
            raise ll.ConfigError(
                f"--methods {name}: cannot be timed here.{did_you_mean(name, speed.methods())} Choose from: all, "
                f"every, {', '.join(speed.methods())}."
            )
    for size in sizes:
        if size not in known:
            raise ll.ConfigError(f"--sizes {size}: choose from {', '.join(known)}.")
    for shape in shapes:
        tokens(shape)
    if args.rounds < 2 or args.threads < 1:
        raise ll.ConfigError("--rounds must be at least 2, for quartiles, and --threads at least 1.")
    return names


def tokens(shape: str) -> int:
    """Tokens of a batch of that shape."""
    rows, _, length = shape.partition("x")
    if not (rows.isdigit() and length.isdigit() and int(rows) * int(length)):
        raise ll.ConfigError(f"--shapes {shape}: write rows x tokens, for instance 4x128.")
    return int(rows) * int(length)


def read(path: Path | None) -> dict[str, Any]:
    """Figures of an earlier run.

    Raises:
        FileError: the file holds something else.
    """
    if path is None or not path.exists():
        return {"rows": []}
    try:
        data = json_module.loads(path.read_text())
        data["rows"][:]
    except (ValueError, KeyError, TypeError):
        raise ll.FileError(f"{path} holds no figures of `lora-lite bench`; give another file, or remove it.") from None
    return data
