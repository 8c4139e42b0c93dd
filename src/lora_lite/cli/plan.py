"""`lora-lite plan`: what a method would adapt in a model of any size; reads the config, never the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import lora_lite as ll

from ._console import say, table
from ._method import build_config


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Show what a method would adapt, and what it costs. Needs no weights: any size of model, in seconds."""

    model: str = "demo"
    """demo, a local model directory, or a hub id."""
    method: str = "lora"
    json: bool = False
    """Print one JSON object."""


def run(args: Plan) -> int:
    the_plan = ll.plan(skeleton(args.model), build_config(args))
    if args.json:
        print(json.dumps(summary(the_plan)))
    else:
        show(the_plan)
    return 0


def skeleton(name: str) -> Any:
    """The model on the meta device: every shape and no weight.

    Raises:
        FileError: no config can be found under that name.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..demo.data import model_path

    try:
        config = AutoConfig.from_pretrained(model_path(name))
    except (OSError, ValueError) as e:
        raise ll.FileError(
            f"no model config under {name!r}: {str(e).splitlines()[0]} Give 'demo', a local folder or a hub id."
        ) from None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def show(the_plan: ll.Plan) -> None:
    """The plan as a table, its totals, and what stays as it is."""
    head, *rest = str(the_plan).split("\n")
    groups = the_plan.groups()
    table(
        ("target", "role", "n", "shape", "dtype", "trained"),
        [(p or "(the model)", role, n, f"{i}->{o}", dtype, f"{k:,}") for p, role, n, i, o, dtype, k in groups],
        title=head,
    )
    for line in rest[1 + len(groups) :]:
        say(line.strip())


def summary(the_plan: ll.Plan) -> dict[str, Any]:
    """The plan as plain data."""
    return {
        "config": the_plan.cfg.to_dict(),
        "targets": [t.path for t in the_plan.targets],
        "trained": the_plan.trainable,
        "parameters": the_plan.params,
        "base": the_plan.base_params,
        "bytes": the_plan.bytes,
        "optimizer_bytes": the_plan.optimizer_bytes,
        "hits": the_plan.hits,
        "unadapted": dict(the_plan.unadapted),
    }
