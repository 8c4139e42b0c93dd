"""`lora-lite diff`: in what two adapter files differ."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ._console import say, table
from ._files import norm, read_file

SHOWN = 20
"""Tensors that are listed, those that are furthest apart."""


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
    configs = facts.get("config", {}), others.get("config", {})
    found = {
        "config": unlike(*configs),
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
    show_settings(*configs)
    for name, other in (("only_a", "a"), ("only_b", "b")):
        if found[name]:
            say(f"{len(found[name])} tensors only in {other}, such as {found[name][0]}")
    reshaped = [k for k, d in found["tensors"].items() if d is None]
    if reshaped:
        say(
            f"{len(reshaped)} tensors have other shapes, such as {reshaped[0]}: {shape_of(mine[reshaped[0]])} in a, "
            f"{shape_of(theirs[reshaped[0]])} in b"
        )
    apart = sorted(((d, k) for k, d in found["tensors"].items() if d is not None), reverse=True)
    if apart:
        table(("tensor", "|a - b| / |a|"), [(k, f"{d:.3e}") for d, k in apart[:SHOWN]])
    if found["tensors"]:
        say(f"{len(found['tensors'])} tensors differ of {len(mine.keys() & theirs.keys())}")
    return 1


def show_settings(a: dict[str, Any], b: dict[str, Any]) -> None:
    """A line for every setting that differs, the method first, and one for those that the other method has not."""
    for key, (left, right) in sorted(unlike(a, b).items(), key=lambda item: item[0] != "variant"):
        if key in a and key in b:
            say(f"{key}: {left!r} in a, {right!r} in b")
    for name, keys in (("a", a.keys() - b.keys()), ("b", b.keys() - a.keys())):
        if keys and a and b:
            say(f"settings that only {name} has: {', '.join(sorted(keys))}")


def shape_of(tensor: Any) -> str:
    """Such as 8x432."""
    return "x".join(map(str, tensor.shape))


def unlike(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configs differ."""
    return {k: (a.get(k), b.get(k)) for k in {**a, **b} if a.get(k) != b.get(k)}


def distance(a: Any, b: Any) -> float | None:
    """|a - b| / |a|; None for tensors of other shapes."""
    if a.shape != b.shape:
        return None
    return norm(a.double() - b.double()) / max(norm(a), 1e-30)
