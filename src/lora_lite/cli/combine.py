"""`lora-lite combine`: one adapter out of several."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

import lora_lite as ll

from ..runtime.combine import Method
from . import _folder as folder
from ._adapters import BaseCheck, check_paths, load_all, names_of, weights_of
from ._base import BaseFlags, check_base, load_base, quiet
from ._console import say
from ._search import SearchFlags, best_of, check_search, corners, show_curve, tried


@dataclass(frozen=True, kw_only=True)
class Combine(SearchFlags, BaseFlags):
    """Write the weighted sum of adapters, ΔW = Σ w ΔW_i, as one adapter; TIES and DARE drop what disagrees.

    With --search, weights are chosen by the loss on a data file.
    """

    adapters: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs, adapter files or folders in PEFT's layout."""
    out: Path
    """File of the new adapter."""
    model: str | None = None  # type: ignore[assignment]
    """demo, a local model directory, or a hub id; None: the one that the adapters were trained on, or demo."""
    weights: tuple[float, ...] = ()
    """One for each adapter, of any sign; none: 1."""
    how: Method = "sum"
    """sum is exact; ties keeps the largest entries and elects signs; dare drops entries at random; dare_ties both."""
    rank: int | None = None
    """Rank to which the result is cut; None: the exact one of sum, and the largest of the adapters' for the others."""
    density: float = 0.5
    """Share of the entries that ties and dare keep."""
    seed: int = 0
    """Seed of what dare drops."""
    base_check: BaseCheck = "error"
    """What to do if an adapter was trained on other base weights."""
    json: bool = False
    """Print one JSON object."""


def run(args: Combine) -> int:
    check_base(args)
    check_paths(args.adapters)
    if len(args.adapters) < 2:
        raise ll.ConfigError("lora-lite combine needs two adapters or more; lora-lite scale takes one.")
    weights = weights_of(args.adapters, args.weights)
    check_search(args)
    folder.check_writable(args.out.parent)
    quiet(args.debug)
    names = names_of(args.adapters)
    name = folder.model_of(args.model, *args.adapters)
    model, tokenizer = load_base(args, name)
    load_all(model, names, args.base_check)
    chosen, curve = dict(zip(names, weights, strict=True)), []
    if args.search:
        curve = tried(args, model, tokenizer, name, corners(list(names), args.search))
        chosen = best_of(curve)
    largest = max(max(t.cfg.r for t in ll.adapters(model)[n].record.targets.values()) for n in names)
    rank = args.rank if args.rank is not None or args.how == "sum" else largest
    made = ll.combine(model, chosen, name="combined", method=args.how, rank=rank, density=args.density, seed=args.seed)
    path = ll.save(model, args.out, name="combined")
    if args.json:
        points = [{"weights": p.weights, **p.told} for p in curve]
        facts = {"out": str(path), "weights": chosen, "how": args.how, "targets": len(made.targets), "curve": points}
        print(json.dumps(facts))
        return 0
    show_curve(curve)
    shown = ", ".join(f"{w:g} x {n}" for n, w in chosen.items())
    say(f"{args.how} of {shown}: {made.num_parameters():,} parameters on {len(made.targets)} layers")
    say(f"adapter  {path}")
    return 0
