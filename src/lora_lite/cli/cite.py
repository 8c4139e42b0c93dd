"""`lora-lite cite`: what to cite for a method."""

from __future__ import annotations

import inspect
import json
import re
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
        facts = {"method": variant.name, "title": variant.title, "paper": variant.paper, "url": url}
        print(json.dumps({**facts, "source": source(variant) if on_arxiv else {}}))
    elif on_arxiv:
        entry = source(variant) | {
            "note": variant.title,
            "eprint": variant.paper,
            "archivePrefix": "arXiv",
            "url": f"https://arxiv.org/abs/{variant.paper}",
        }
        print("\n".join([f"@misc{{{variant.name},", *(f"  {key} = {{{value}}}," for key, value in entry.items()), "}"]))
    else:
        say(f"{variant.name}: {variant.paper or 'no source of its own'}")
    return 0


def source(variant: type[ll.Variant]) -> dict[str, str]:
    """Author, title and year as the page writes them before its arXiv number: "Hu et al. 2021, LoRA: ..., arXiv"; empty
    where it says them otherwise."""
    text = " ".join(inspect.cleandoc(variant.__doc__ or "").split())
    for number in re.finditer(f"arXiv {re.escape(variant.paper)}", text):
        before = text[: number.start()].rstrip(", ")
        years = list(re.finditer(r" (\d{4}), ", before))
        if years:
            names = re.split(r"[.;:] |\(", before[: years[-1].start()].replace("et al.", "and others"))[-1].strip()
            return {"author": names.replace(", ", " and "), "title": before[years[-1].end() :], "year": years[-1][1]}
    return {}
