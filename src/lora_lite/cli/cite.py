"""`lora-lite cite`: what to cite for a method."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import tyro

import lora_lite as ll

from ..core.registry import called
from ._console import say


@dataclass(frozen=True, kw_only=True)
class Cite:
    """Print the source of a method, as a BibTeX entry where it is on arXiv."""

    name: Annotated[str, tyro.conf.Positional] = "lora"
    """The method."""
    json: bool = False
    """Print one JSON object."""


def run(args: Cite) -> int:
    variant = called(args.name) or ll.get_variant(args.name)
    on_arxiv = variant.paper.replace(".", "").isdigit()
    if args.json:
        url = f"https://arxiv.org/abs/{variant.paper}" if on_arxiv else None
        print(json.dumps({"method": variant.name, "title": variant.title, "paper": variant.paper, "url": url}))
    elif on_arxiv:
        lines = [
            f"@misc{{{variant.name},",
            f"  note = {{{variant.title}}},",
            f"  eprint = {{{variant.paper}}},",
            "  archivePrefix = {arXiv},",
            f"  url = {{https://arxiv.org/abs/{variant.paper}}},",
            "}",
        ]
        say("\n".join(lines))
    else:
        say(f"{variant.name}: {variant.paper or 'no source of its own'}")
    return 0
