"""`lora-lite info`: what an adapter file holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..core.errors import size_text
from ._console import say, table
from ._files import norm, read_file


@dataclass(frozen=True, kw_only=True)
class Info:
    """Show what an adapter file holds: method, ranks, targets, norms, dead and damaged tensors, dtypes, size, base."""

    file: Annotated[Path, tyro.conf.Positional]
    """An adapter file, the folder of a run, or a folder in PEFT's layout."""
    json: bool = False
    """Print one JSON object, with the norm of every tensor."""
    debug: bool = False
    """Show tracebacks and other libraries' messages."""


def run(args: Info) -> int:
    facts, tensors = read_file(args.file)
    norms = {key: norm(t) for key, t in tensors.items()}
    facts |= {
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors.values()),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        "dead": [key for key, value in norms.items() if value == 0],
        "not_finite": [key for key, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()],
    }
    if args.json:
        print(json.dumps({**facts, "norms": norms}))
        return 0
    shown = {k: v for k, v in facts.items() if k not in ("config", "targets", "dead", "not_finite", "bytes")}
    shown |= {"parameters": f"{facts['parameters']:,}"}
    shown |= {"size": size_text(facts["bytes"]), "targets": len(facts["targets"])}
    shown |= {"dead tensors": len(facts["dead"]), "not finite": len(facts["not_finite"])}
    table(("what", "value"), [(k, cell(v)) for k, v in shown.items() if v is not None])
    say()
    largest = sorted(norms.items(), key=lambda item: -item[1])[:5]
    table(("largest tensors", "shape", "norm"), [(k, shape(tensors[k]), f"{v:.4g}") for k, v in largest])
    return 0


def cell(value: object) -> object:
    """A list as its words."""
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def shape(t: object) -> str:
    """Such as 8x768."""
    return "x".join(map(str, t.shape)) or "1"  # type: ignore[attr-defined]
