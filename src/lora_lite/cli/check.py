"""`lora-lite check`: would an adapter load into a model, on which layers, and does it act?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

import lora_lite as ll

from . import _folder as folder
from ._adapters import BaseCheck, check_paths
from ._base import BaseFlags, check_base, load_base, quiet
from ._console import say


@dataclass(frozen=True, kw_only=True)
class Check(BaseFlags):
    """Load an adapter into a model and compare the outputs with and without it. Exit code 1 if it does not act."""

    adapter: Annotated[Path, tyro.conf.Positional]
    """An adapter file, the folder of a run, or a folder in PEFT's layout."""
    model: str | None = None  # type: ignore[assignment]
    """demo, a local model directory, or a hub id; None: the one that the adapter's run was trained on, or demo."""
    text: str = "The quick brown fox jumps over the lazy dog."
    """What the model reads."""
    base_check: BaseCheck = "error"
    """What to do if the adapter was trained on other base weights."""
    json: bool = False
    """Print one JSON object."""


def run(args: Check) -> int:
    check_base(args)
    check_paths([args.adapter])
    quiet(args.debug)
    name = folder.model_of(args.model, args.adapter)
    model, tokenizer = load_base(args, name)
    adapter = ll.load(model, folder.adapter_path(args.adapter), base_check=args.base_check)
    effect, size = effect_of(model, tokenizer, args.text)
    facts = {
        "model": name,
        "method": adapter.cfg.variant,
        "targets": adapter.targets,
        "parameters": sum(p.numel() for p in ll.adapter_state_dict(model, adapter.name).values()),
        "effect": effect,
        "logits": size,
        "acts": effect > 0,
    }
    if args.json:
        print(json.dumps(facts))
    else:
        say(f"{args.adapter} loads into {name}: {adapter.cfg.variant} on {len(adapter.targets)} layers, such as "
            f"{adapter.targets[0]}")  # fmt: skip
        says = f"it acts: logits up to {size:.3g} change by up to {effect:.3g}" if effect else "it does nothing"
        say(f"{says} on {args.text!r}", "green" if effect else "yellow")
    return 0 if effect else 1


def effect_of(model: Any, tokenizer: Any, text: str) -> tuple[float, float]:
    """(the largest change of a logit, the largest logit)."""
    import torch

    model.eval()
    batch = tokenizer(text, return_tensors="pt").to(model.device)
    with torch.no_grad():
        adapted = model(input_ids=batch["input_ids"]).logits.float()
        with ll.active(model, None):
            bare = model(input_ids=batch["input_ids"]).logits.float()
    return float((adapted - bare).abs().max()), float(bare.abs().max())
