"""`lora-lite variants`: every registered method."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import shutil
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

import lora_lite as ll

from ..core.registry import called, said_as
from ..runtime.layers.kinds import kind_named
from ..runtime.targets.choose import add_shared, make_target
from ._console import markdown, say, stream, table
from ._method import field_docs

WIDTH, RANK = 768, 8
SHORT = ("method", "trained", "needs", "what it does")
GAPS = 6
"""Spaces between the columns of the short table."""
COLUMNS = ("method", "what it does", "site", "merges", "needs", "trained", "lr", "source")


@dataclass(frozen=True, kw_only=True)
class Variants:
    """List the methods: what they do, where they act, what they need, how much they train; or the page of one."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """One method by any of its names: its formula, options and facts."""
    markdown: bool = False
    """Print a markdown table (the one of docs/methods.md)."""
    json: bool = False
    """Print one JSON object per line."""


def run(args: Variants) -> int:
    if args.name is not None:
        variant = called(args.name) or ll.get_variant(args.name)
        if variant.name != args.name and not args.json:
            say(f"{said_as(args.name, variant)}.")
        return show_page(variant, args.json)
    found = [facts(v) for v in ll.variants()]
    if args.json:
        for row in found:
            print(json.dumps(row))
    elif args.markdown:
        print(markdown(COLUMNS, [cells(row, link=True) for row in found]))
    else:
        table(SHORT, lines_of(found))
        say(f"{len(found)} methods. trained: parameters of one {WIDTH}x{WIDTH} layer at r={RANK}.")
        say("Other names: " + "; ".join(f"{also_called(v)}: {v.name}" for v in ll.variants() if v.also) + ".")
        say("One of them: lora-lite variants NAME. Its options: lora-lite train --method NAME --help")
    return 0


def lines_of(found: list[dict[str, Any]]) -> list[list[str]]:
    """One line for each method, cut to the width of the terminal."""
    every = [[row[0], row[5], row[4], row[1]] for row in map(cells, found)]
    widths = [max(len(name), *(len(row[i]) for row in every)) for i, name in enumerate(SHORT[:3])]
    room = max(20, shutil.get_terminal_size().columns - sum(widths) - GAPS) if stream().isatty() else 10**6
    return [[*row, title if len(title) <= room else title[: room - 1].rstrip() + "…"] for *row, title in every]


def show_page(variant: type[ll.Variant], as_json: bool) -> int:
    """The page of one method: its docstring with the formula, its facts, and its options."""
    known = facts(variant)
    if as_json:
        print(json.dumps({**known, "page": inspect.cleandoc(variant.__doc__ or ""), "ignores": list(variant.ignores)}))
        return 0
    say(f"{variant.name}: {inspect.cleandoc(variant.__doc__ or variant.title)}")
    say()
    shown = dict(zip(COLUMNS[2:], cells(known)[2:], strict=True)) | {"ignores": ", ".join(variant.ignores) or "-"}
    table(("fact", "value"), [*shown.items(), ("also", also_called(variant) or "-")])
    docs = field_docs(variant.config)
    common = {f.name for f in dataclasses.fields(ll.AdapterConfig)}
    own = [f for f in dataclasses.fields(variant.config) if f.name not in common]
    if own:
        say()
        table(("option", "default", "what it does"), [(f.name, f.default, docs.get(f.name, "")) for f in own])
    say()
    say(f"cost on a model: lora-lite plan --method {variant.name} --cost --model NAME")
    return 0


def facts(variant: type[ll.Variant]) -> dict[str, Any]:
    """What the registry knows of one method."""
    return {
        "name": variant.name,
        "title": variant.title,
        "also": dict(variant.also),
        "site": variant.site,
        "merges": variant.affine and not kind_named(variant.site).apart,
        "needs_weight": variant.needs_weight,
        "needs_data": variant.needs_data,
        "schedule": variant.on_step is not None,
        "trained": trained(variant),
        "lr": variant.lr if variant.trains else None,
        "paper": variant.paper,
    }


def also_called(variant: type[ll.Variant]) -> str:
    """Other names of the method: "Polytropon, MHR (splits=2 or more)"."""
    return ", ".join(f"{name} ({how})" if how else name for name, how in variant.also.items())


def trained(variant: type[ll.Variant]) -> int | None:
    """Trained parameters of one square layer, tensors shared by several layers included; None where the default config
    does not fit it."""
    try:
        cfg = variant.config(variant=variant.name, r=RANK)
        target = make_target("layer", WIDTH, WIDTH, cfg, variant.site)
        if variant.shared_specs is not None:
            add_shared([target], cfg)
    except ll.LoraLiteError:
        return None
    return sum(math.prod(s.shape) for s in target.specs.values() if s.is_trained)


def cells(row: dict[str, Any], link: bool = False) -> list[str]:
    """One line of the table."""
    needs = [word for word in ("weight", "data") if row[f"needs_{word}"]] + ["schedule"] * row["schedule"]
    paper = row["paper"]
    if link and paper.replace(".", "").isdigit():
        paper = f"[{paper}](https://arxiv.org/abs/{paper})"
    return [
        f"`{row['name']}`" if link else row["name"],
        row["title"] + (f"; also {', '.join(row['also'])}" if link and row["also"] else ""),
        row["site"],
        "yes" if row["merges"] else "no",
        ", ".join(needs) or "-",
        "-" if row["trained"] is None else f"{row['trained']:,}",
        "-" if row["lr"] is None else f"{row['lr']:g}",
        paper or "-",
    ]
