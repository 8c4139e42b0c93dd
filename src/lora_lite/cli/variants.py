"""`lora-lite variants`: every registered method."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import lora_lite as ll

from ..runtime.layers.kinds import kind_named
from ..runtime.targets.choose import add_shared, make_target
from ._console import markdown, say, table

WIDTH, RANK = 768, 8
COLUMNS = ("method", "what it does", "site", "merges", "needs", "trained", "lr", "source")


@dataclass(frozen=True, kw_only=True)
class Variants:
    """List the methods: what they do, where they act, what they need, how much they train."""

    markdown: bool = False
    """Print a markdown table (the one of the README)."""
    json: bool = False
    """Print one JSON object per line."""


def run(args: Variants) -> int:
    found = [facts(v) for v in ll.variants()]
    if args.json:
        for row in found:
            print(json.dumps(row))
    elif args.markdown:
        print(markdown(COLUMNS, [cells(row, link=True) for row in found]))
    else:
        table(COLUMNS, [cells(row) for row in found])
        say(
            f"{len(found)} methods. trained: parameters of one {WIDTH}x{WIDTH} layer at r={RANK}; lr: recommended, "
            "for AdamW."
        )
        say("Options of one: lora-lite train --method NAME --help")
    return 0


def facts(variant: type[ll.Variant]) -> dict[str, Any]:
    """What the registry knows of one method."""
    return {
        "name": variant.name,
        "title": variant.title,
        "site": variant.site,
        "merges": variant.affine and not kind_named(variant.site).stream,
        "needs_weight": variant.needs_weight,
        "needs_data": variant.needs_data,
        "schedule": variant.on_step is not None,
        "trained": trained(variant),
        "lr": variant.lr if variant.trains else None,
        "paper": variant.paper,
    }


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
        row["title"],
        row["site"],
        "yes" if row["merges"] else "no",
        ", ".join(needs) or "-",
        "-" if row["trained"] is None else f"{row['trained']:,}",
        "-" if row["lr"] is None else f"{row['lr']:g}",
        paper or "-",
    ]
