"""`lora-lite scale`: one adapter, stronger or weaker."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

import lora_lite as ll

from . import _folder as folder
from ._adapters import BaseCheck, check_paths, load_all, names_of
from ._base import BaseFlags, check_base, load_base, quiet
from ._console import say
from ._search import SearchFlags, best_of, check_search, corners, show_curve, tried


@dataclass(frozen=True, kw_only=True)
class Scale(SearchFlags, BaseFlags):
    """Write an adapter whose update is so many times as strong: w ΔW.

    With --search, the loss on a data file is shown for every weight, and the best one is taken. Without --out nothing
    is written.
    """

    adapter: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, an adapter file or a folder in PEFT's layout."""
    by: float | None = None
    """The factor; None: the best of --search."""
    out: Path | None = None
    """File of the new adapter."""
    model: str | None = None  # type: ignore[assignment]
    """demo, a local model directory, or a hub id; None: the one that the adapter was trained on, or demo."""
    base_check: BaseCheck = "error"
    """What to do if the adapter was trained on other base weights."""
    json: bool = False
    """Print one JSON object."""


def run(args: Scale) -> int:
    check_base(args)
    check_paths([args.adapter])
    check_search(args)
    if args.by is None and not args.search:
        raise ll.ConfigError("lora-lite scale needs --by FACTOR, or --search with --data.")
    if args.by is not None and args.search:
        raise ll.ConfigError("--by gives the factor and --search looks for it; give one of them.")
    if args.by is not None and not math.isfinite(args.by):
        raise ll.ConfigError(f"--by must be finite, got {args.by}.")
    if args.out is None and not args.search:
        raise ll.ConfigError("--by needs --out, the file of the new adapter.")
    if args.out is not None:
        folder.check_writable(args.out.parent)
    quiet(args.debug)
    (name,) = names = names_of([args.adapter])
    base = folder.model_of(args.model, args.adapter)
    model, tokenizer = load_base(args, base)
    load_all(model, names, args.base_check)
    curve = tried(args, model, tokenizer, base, corners([name], args.search)) if args.search else []
    by = args.by if args.by is not None else best_of(curve)[name]
    path = None
    if args.out is not None:
        ll.combine(model, {name: by}, name="scaled")
        path = ll.save(model, args.out, name="scaled")
    if args.json:
        points = [{"weight": p.weights[name], **p.told} for p in curve]
        print(json.dumps({"by": by, "out": None if path is None else str(path), "curve": points}))
        return 0
    show_curve(curve)
    say(f"{by:g} times {args.adapter}")
    say(f"adapter  {path}" if path is not None else "nothing is written without --out")
    return 0
