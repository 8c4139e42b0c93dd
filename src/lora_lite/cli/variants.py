"""`lora-lite variants`: every registered method."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import re
import shutil
import textwrap
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

import lora_lite as ll

from ..core.registry import called, said_as
from ..runtime.layers.kinds import kind_named
from ..runtime.targets.choose import add_shared, make_target
from ._console import markdown, say, stream, styled, table
from ._method import field_docs
from ._picture import drawn

WIDTH, RANK = 768, 8
NEEDS = {"needs_weight": "W", "needs_data": "D", "schedule": "S"}
"""The letters of the short list."""
TENSORS = ("tensor", "shape", "start", "is")
NARROWEST = 40
"""No terminal is taken to be narrower."""
COLUMNS = ("method", "what it does", "site", "merges", "needs", "trained", "lr", "source")


@dataclass(frozen=True, kw_only=True)
class Variants:
    """List the methods: what they do, where they act, what they need, how much they train; or the page of one."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """One method by any of its names: its formula, where it hooks, its tensors, facts and options."""
    model: str | None = None
    """Of one method also its cost on this model: demo, a folder, a hub id, or a shape such as llama-8b."""
    markdown: bool = False
    """Print a markdown table (the one of docs/methods.md)."""
    json: bool = False
    """Print one JSON object per line."""


def run(args: Variants) -> int:
    if args.name is not None:
        variant = called(args.name) or ll.get_variant(args.name)
        if variant.name != args.name and not args.json:
            say(f"{said_as(args.name, variant)}.")
        return show_page(variant, args.json, args.model)
    if args.model is not None:
        raise ll.ConfigError("--model is for the page of one method; of all: lora-lite plan --model M --compare all.")
    found = [facts(v) for v in ll.variants()]
    if args.json:
        for row in found:
            print(json.dumps(row))
    elif args.markdown:
        print(markdown(COLUMNS, [cells(row, link=True) for row in found]))
    else:
        show_list(found)
    return 0


def show_list(found: list[dict[str, Any]]) -> None:
    """One line for each method under the name of its family, cut to the width of the terminal, whole in a pipe."""
    names = max(len(row["name"]) for row in found)
    sizes = max(len(cells(row)[5]) for row in found)
    for family in sorted({row["family"] for row in found}):
        styled([(f"{family[:1].upper()}{family[1:]}", "bold")])
        for row in (row for row in found if row["family"] == family):
            needs = "".join(letter for word, letter in NEEDS.items() if row[word])
            start = f"  {row['name']:<{names}}  {cells(row)[5]:>{sizes}}  {needs:<{len(NEEDS)}} "
            styled([(cut(start + row["title"]), "")])
        say()
    say(f"{len(found)} methods; the number: trained parameters of one {WIDTH}x{WIDTH} layer at r={RANK}.")
    say("W: reads the weight. D: starts from data. S: has a schedule.")
    others = "; ".join(f"{also_called(v)}: {v.name}" for v in ll.variants() if v.also)
    say(f"Other names: {others}." if width() is None else "Other names too: lora-lite variants MHR")
    say("One method: lora-lite variants NAME")
    say("Its flags:  lora-lite train --method NAME --help")


def width() -> int | None:
    """Columns to write in: those of the terminal, or that COLUMNS names; None in a pipe."""
    if stream().isatty() or os.environ.get("COLUMNS", "").isdigit():
        return max(NARROWEST, shutil.get_terminal_size().columns)
    return None


def cut(line: str) -> str:
    """A line that is not longer than the terminal is wide."""
    room = width()
    return line if room is None or len(line) <= room else line[: room - 1].rstrip() + "…"


def filled(text: str) -> str:
    """Paragraphs broken anew where the terminal is narrower than their lines; what is indented stays as it is."""
    room = width()
    if room is None or room >= max(map(len, text.splitlines())):
        return text
    parts = text.split("\n\n")
    return "\n\n".join(p if re.search(r"^ ", p, re.M) else textwrap.fill(p, room) for p in parts)


def show_page(variant: type[ll.Variant], as_json: bool, model: str | None) -> int:
    """The page of one method: its docstring with the formula, where it hooks, its tensors, facts and options, and what
    it costs on a model."""
    known, made = facts(variant), tensors(variant)
    cost = cost_on(model, variant) if model is not None else None
    if as_json:
        page = {"page": inspect.cleandoc(variant.__doc__ or ""), "ignores": list(variant.ignores)}
        found = {"tensors": [dict(zip(TENSORS, row, strict=True)) for row in made], "picture": drawn(variant)}
        print(json.dumps({**known, **page, **found, **({"cost": dataclasses.asdict(cost)} if cost else {})}))
        return 0
    say(filled(f"{variant.name}: {inspect.cleandoc(variant.__doc__ or variant.title)}"))
    say()
    say(drawn(variant))
    say()
    if made:
        table(TENSORS, made, title=f"of one {WIDTH}x{WIDTH} layer at r={RANK}")
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
    say(str(cost) if cost else f"cost on a model: lora-lite variants {variant.name} --model llama-8b")
    return 0


def cost_on(model: str, variant: type[ll.Variant]) -> ll.Cost:
    """Memory and operations of a training step of one row of 2,048 tokens."""
    from .plan import skeleton

    return ll.cost(skeleton(model), variant.config(variant=variant.name, r=RANK))


def tensors(variant: type[ll.Variant]) -> list[tuple[str, str, str, str]]:
    """(tensor, shape, start, who changes it) of one square layer, tensors shared by several layers included; none where
    the default config does not fit it."""
    target = example(variant)
    if target is None:
        return []
    return [
        (
            name,
            " x ".join(map(str, spec.shape)),
            spec.init if isinstance(spec.init, str) and spec.init != "empty" else "by the page",
            "trained" if spec.is_trained else "not trained",
        )
        for name, spec in target.specs.items()
    ]


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
        "family": variant.family,
        "trained": trained(variant),
        "lr": variant.lr if variant.trains else None,
        "paper": variant.paper,
    }


def also_called(variant: type[ll.Variant]) -> str:
    """Other names of the method: "Polytropon, MHR (splits=2 or more)"."""
    return ", ".join(f"{name} ({how})" if how else name for name, how in variant.also.items())


def example(variant: type[ll.Variant]) -> Any:
    """One square layer as the method sees it, with the tensors that several layers share; None where the default config
    does not fit it."""
    try:
        cfg = variant.config(variant=variant.name, r=RANK)
        target = make_target("layer", WIDTH, WIDTH, cfg, variant.site)
        if variant.shared_specs is not None:
            add_shared([target], cfg)
    except ll.LoraLiteError:
        return None
    return target


def trained(variant: type[ll.Variant]) -> int | None:
    """Trained parameters of that layer."""
    target = example(variant)
    return None if target is None else sum(math.prod(s.shape) for s in target.specs.values() if s.is_trained)


def cells(row: dict[str, Any], link: bool = False) -> list[str]:
    """One line of the table."""
    needs = [word.removeprefix("needs_") for word in NEEDS if row[word]]
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
