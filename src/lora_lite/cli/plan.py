"""`lora-lite plan`: what a method would adapt in a model of any size; reads the config, never the weights."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any

import lora_lite as ll

from ..core.errors import did_you_mean, size_text
from ..cost.paper import Paper
from ..cost.spread import Spread, spread
from ._base import BaseDtype, quiet
from ._console import Bar, say, table
from ._method import build_config


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Show what a method would adapt, and what it costs. Needs no weights: any size of model, in seconds."""

    model: str = "demo"
    """demo, a local model directory, a hub id, or a shape alone: llama-8b, llama-70b, llama-405b."""
    method: str = "lora"
    cost: bool = False
    """Also count memory and operations of a training step: a few seconds."""
    compare: tuple[str, ...] = ()
    """Compare the costs of these methods at their default sizes, or of `all`, in one table."""
    batch: int = 1
    """Rows of a training batch, for the costs."""
    length: int = 2048
    """Tokens of a row, for the costs."""
    base_dtype: BaseDtype = "auto"
    """Storage of the base weights; auto: the checkpoint's."""
    gpu: str | None = None
    """Memory of a GPU, such as 24GB: does a training step fit? With and without gradient checkpointing."""
    gpus: int = 1
    """GPUs over which FSDP2 cuts the model: what each holds and sends in a step, with --gpu whether it fits."""
    shards: int = 0
    """GPUs that hold one copy together, fewer than --gpus (a two-dimensional mesh); 0: all."""
    json: bool = False
    """Print one JSON object."""
    debug: bool = False
    """Show tracebacks and other libraries' messages."""


def run(args: Plan) -> int:
    quiet(args.debug)
    if args.batch < 1 or args.length < 1:
        raise ll.ConfigError(f"--batch and --length must be positive, got {args.batch} and {args.length}.")
    model = skeleton(args.model, args.base_dtype)
    if args.compare:
        if args.gpus != 1 or args.shards:
            raise ll.ConfigError("--gpus and --shards are for one method: --method NAME instead of --compare.")
        return compare(model, args)
    the_plan = ll.plan(model, build_config(args))
    limit = gibibytes(args.gpu) if args.gpu is not None else None
    cost = ll.cost(model, build_config(args), args.batch, args.length) if args.cost or limit else None
    many = spread(model, build_config(args), args.gpus, shards=args.shards) if args.gpus != 1 or args.shards else None
    if args.json:
        counted = {"cost": cost, "spread": many}
        print(json.dumps(summary(the_plan) | {k: dataclasses.asdict(v) for k, v in counted.items() if v}))
    else:
        show(the_plan)
        if cost and args.cost:
            say(str(cost))
        if many:
            say(str(many))
        if cost and limit:
            show_fit(cost, limit, many)
    return 0


def gibibytes(text: str) -> float:
    """`24GB`, `24GiB` or `24` as GiB, which is what the makers of GPUs mean.

    Raises:
        ConfigError: it is no number.
    """
    found = re.fullmatch(r"([0-9.]+)\s*(G|GB|GiB)?", text, re.I)
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if number <= 0:
        raise ll.ConfigError(f"--gpu takes a size such as 24GB, got {text!r}.")
    return number


def show_fit(c: ll.Cost, limit: float, many: Spread | None = None) -> None:
    """Whether a step fits into a GPU: base, adapter, its gradients and moments, and what the passes keep."""
    alone = c.base_bytes + c.adapter_bytes + c.gradient_bytes + c.optimizer_bytes
    steady = many.resting + many.gathered if many else alone
    for name, saved in (
        ("a step", c.base_saved + c.extra_saved),
        ("with gradient checkpointing", c.base_checkpointed + c.extra_checkpointed),
    ):
        need = steady + saved
        verdict = "fits" if need < 0.9 * limit * 2**30 else "does not fit"
        say(f"{name}: {size_text(need)} of {limit:g} GiB: {verdict} ({c.batch} x {c.length} tokens; a tenth kept free)")


def compare(model: Any, args: Plan) -> int:
    """One table of costs, a row per method.

    Raises:
        ConfigError: an unknown method, or one that is not trained.
    """
    trained = [v.name for v in ll.variants() if v.trains]
    names = trained if "all" in args.compare else list(args.compare)
    for name in names:
        if name not in trained:
            raise ll.ConfigError(
                f"--compare {name}: no trained method has that name.{did_you_mean(name, trained)} Choose from: all, "
                f"{', '.join(trained)}."
            )
    costs, left = [], []
    with Bar("counting", len(names) + 1) as bar:
        paper = Paper(model, args.batch, args.length)
        for i, name in enumerate(names, 1):
            bar.update(i, name)
            try:
                costs.append(paper.cost(ll.get_variant(name).config(variant=name)))
            except (ll.ConfigError, ll.TargetError) as e:
                left.append(f"{name}: {e}")
    if args.json:
        print(json.dumps([dataclasses.asdict(c) for c in costs]))
        return 0
    table(COLUMNS, [cells(c) for c in costs], title=heading(costs[0]) if costs else "")
    for line in left:
        say(f"left out: {line}")
    return 0


COLUMNS = ("method", "trained", "adapter", "optimiser", "saved", "of the base's", "checkpointed", "forward", "step")


def cells(c: ll.Cost) -> list[str]:
    """One row of the comparison."""
    return [
        c.variant,
        f"{c.trained:,}",
        size_text(c.adapter_bytes),
        size_text(c.optimizer_bytes),
        f"+{size_text(c.extra_saved)}",
        f"{c.extra_saved / max(1, c.base_saved):+.1%}",
        f"+{size_text(c.extra_checkpointed)}",
        f"{c.extra_forward / max(1, c.base_forward):+.2%}",
        f"{c.extra_step / max(1, c.base_step):+.2%}",
    ]


def heading(c: ll.Cost) -> str:
    """What all rows have in common."""
    return (
        f"{c.base_params:,} parameters ({size_text(c.base_bytes)}), {c.batch} x {c.length} tokens: the frozen base "
        f"saves {size_text(c.base_saved)} for the backward pass ({size_text(c.base_checkpointed)} with gradient "
        f"checkpointing) and does {c.base_forward / 1e12:.3g} TFLOP forward, {c.base_step / 1e12:.3g} in a step"
    )


def skeleton(name: str, dtype: BaseDtype = "auto") -> Any:
    """The model on the meta device: every shape and no weight; in the dtype of its checkpoint, as train loads it.

    Raises:
        FileError: no config can be found under that name.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..demo.data import model_path

    try:
        config = shape(name) if name in SHAPES else AutoConfig.from_pretrained(model_path(name))
    except Exception as e:
        first = (str(e).splitlines() or [type(e).__name__])[0].strip().rstrip(".")
        raise ll.FileError(
            f"no model config under {name!r}: {first}. Give 'demo', a local folder or a hub id."
        ) from None
    stored = config.dtype or config.get_text_config().dtype or torch.float32
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=stored if dtype == "auto" else getattr(torch, dtype))


SHAPES = {
    "llama-8b": (4096, 32, 14336, 32),
    "llama-70b": (8192, 80, 28672, 64),
    "llama-405b": (16384, 126, 53248, 128),
}
"""Width, blocks, width of the feed-forward and attention heads of the Llama 3.1 family, which all have 8 key-value
heads."""


def shape(name: str) -> Any:
    """The config of one of `SHAPES`, in bf16."""
    from transformers import LlamaConfig

    width, blocks, inner, heads = SHAPES[name]
    return LlamaConfig(
        hidden_size=width,
        num_hidden_layers=blocks,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
    )


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
