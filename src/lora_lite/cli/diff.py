"""`lora-lite diff`: in what two adapter files differ."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ._console import say, table
from ._files import norm, read_file


@dataclass(frozen=True, kw_only=True)
class Diff:
    """Compare two adapter files: their settings, and how far apart their tensors are. Exit code 1 if they differ."""

    a: Annotated[Path, tyro.conf.Positional]
    """An adapter file, the folder of a run, or a folder in PEFT's layout."""
    b: Annotated[Path, tyro.conf.Positional]
    """The other one."""
    json: bool = False
    """Print one JSON object."""
    debug: bool = False
    """Show tracebacks and other libraries' messages."""


def run(args: Diff) -> int:
    (facts, mine), (others, theirs) = read_file(args.a), read_file(args.b)
    found = {
        "config": unlike(facts.get("config", {}), others.get("config", {})),
        "only_a": sorted(mine.keys() - theirs.keys()),
        "only_b": sorted(theirs.keys() - mine.keys()),
        "tensors": {k: d for k in sorted(mine.keys() & theirs.keys()) if (d := distance(mine[k], theirs[k])) != 0},
    }
    same = not any(found.values())
    if args.json:
        print(json.dumps({**found, "same": same}))
        return 0 if same else 1
    if same:
        say("the same settings and the same tensors")
        return 0
    for key, (left, right) in found["config"].items():
        say(f"{key}: {left!r} in a, {right!r} in b")
    for name, other in (("only_a", "a"), ("only_b", "b")):
        if found[name]:
            say(f"{len(found[name])} tensors only in {other}, such as {found[name][0]}")
    if found["tensors"]:
        rows = sorted(found["tensors"].items(), key=lambda item: -(item[1] or 0))
        table(("tensor", "|a - b| / |a|"), [(k, "other shape" if d is None else f"{d:.3e}") for k, d in rows[:20]])
        say(f"{len(rows)} tensors differ of {len(mine.keys() & theirs.keys())}")
    return 1


def unlike(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configs differ."""
    return {k: (a.get(k), b.get(k)) for k in {**a, **b} if a.get(k) != b.get(k)}


def distance(a: Any, b: Any) -> float | None:
    """|a - b| / |a|; None for tensors of other shapes."""
    if a.shape != b.shape:
        return None
    return norm(a.double() - b.double()) / max(norm(a), 1e-30)
