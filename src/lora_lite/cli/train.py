"""`lora-lite train`: any method, any causal model, wordmath or any JSONL."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lora_lite as ll

from . import _session as session
from ._console import clock, say, table
from ._method import build_config

FREE = ("resume", "overwrite", "dry_run", "debug", "threads", "adapter", "out", "keep", "epochs")
"""Flags that may differ when a run is resumed."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train an adapter and write it, a log of every step and a picture of the losses into a folder.

    The same command with --resume goes on from the last checkpoint, to the same bits as a run without interruption.
    """

    model: str = "demo"
    """demo (the bundled base), a local model directory, or a hub id."""
    data: str = "wordmath"
    """wordmath, or a JSONL file with text, prompt and completion, or messages."""
    eval_data: str | None = None
    """JSONL for the eval loss. None: the validation split of wordmath, or a tenth of the file, held out."""
    out: Path = Path("runs/train")
    """Folder for adapter.safetensors, log.jsonl, loss.png, run.json and checkpoints."""
    method: str = "lora"
    rows: int | None = None
    """At most so many training rows; None: all (2,000 of wordmath)."""
    eval_rows: int = 200
    """At most so many eval rows; 0: no evaluation."""
    steps: int | None = None
    """Optimiser steps; None: as many as --epochs makes."""
    epochs: float = 1.0
    """Passes over the data, where --steps is not given."""
    batch_size: int = 16
    """Rows per forward pass."""
    accumulation: int = 1
    """Forward passes per optimiser step."""
    lr: float | None = None
    """Learning rate; None: the one recommended for the method."""
    warmup: float = 0.05
    """Steps of warm-up; below 1: that share of all steps."""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Course of the learning rate after the warm-up."""
    weight_decay: float = 0.0
    """Weight decay; gains, rotations and magnitudes are always spared."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""
    seed: int = 0
    """Seed of the adapter's start, of the order of the data and of dropout."""
    base_dtype: session.BaseDtype = "float32"
    """Storage of the base weights (--dtype is the adapter's)."""
    max_length: int = 512
    """Longest row in tokens; prompts are cut at the beginning, texts at the end."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    calibration_batches: int | None = None
    """Batches of training rows for methods that start from data; None: 8 for those."""
    reference_weights: str | None = None
    """Full-precision checkpoint of a quantised --model (file, folder, hub id): LoRA starts by taking back what
    quantising lost."""
    eval_every: int = 50
    """Steps between two evaluations; 0: none."""
    save_every: int = 50
    """Steps between two checkpoints; 0: none."""
    keep: int = 2
    """Checkpoints kept, the newest ones."""
    best: bool = False
    """End with the adapter of the lowest eval loss, not with the last one."""
    trainer: Literal["hf", "sft"] = "hf"
    """transformers' Trainer, or TRL's SFTTrainer."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""
    resume: bool = False
    """Go on from the last checkpoint in --out."""
    overwrite: bool = False
    """Replace a run that --out holds."""
    dry_run: bool = False
    """Show the plan, the steps and the tokens, and do nothing."""
    debug: bool = False
    """Show tracebacks and other libraries' messages."""


def run(args: Train) -> int:
    check(args)
    cfg = build_config(args)
    variant = ll.get_variant(cfg.variant)
    session.quiet(args.debug)
    resume = session.last_checkpoint(args.out) if args.resume else None
    if resume is None and not args.dry_run:
        session.check_folder(args.out, args.overwrite)
    model, tokenizer = session.prepare(args.model, args.base_dtype, args.threads, args.seed)
    examples, held, origin = session.split_rows(
        args.data, args.eval_data, args.rows, args.eval_rows if args.eval_every else 0, args.seed, tokenizer
    )
    train = session.encoded(examples, tokenizer, args.max_length)
    evals = session.encoded(held, tokenizer, args.max_length)
    if not train:
        raise ll.FileError(f"{args.data} leaves no row to train on; lower --eval-rows.")
    per_step = args.batch_size * args.accumulation
    steps = args.steps if args.steps is not None else math.ceil(len(train) * args.epochs / per_step)
    lr = variant.lr if args.lr is None else args.lr
    facts = decisive(args, cfg, steps, lr)

    if args.dry_run:
        from .plan import show

        show(ll.plan(model, cfg))
        average = sum(len(r["input_ids"]) for r in train) / len(train)
        table(
            ("what", "value"),
            [
                ("training rows", f"{len(train):,}"),
                ("eval rows", f"{len(evals):,} ({origin})"),
                ("steps", f"{steps:,} of {per_step} rows ({steps * per_step / len(train):.2f} epochs)"),
                ("tokens", f"{round(average * steps * per_step):,} (padding not counted)"),
                ("learning rate", f"{lr:g} ({args.schedule})"),
                ("out", str(args.out)),
            ],
        )
        return 0

    if resume is not None:
        session.check_same_run(args.out, facts)
    adapter = session.attach(
        model, cfg, args.calibration_batches, train, args.batch_size, tokenizer, reference=args.reference_weights
    )
    if resume is None:
        session.open_folder(args.out, args.overwrite)
        session.write_run(args.out, facts)
    say(
        f"{variant.name}: {adapter.num_parameters():,} trained parameters on {len(adapter.targets)} layers of "
        f"{args.model}"
    )
    if variant.trains:
        say(f"{steps} steps of {per_step} rows of {args.data}, lr {lr:g}; eval on {origin if evals else 'nothing'}")
        if resume is not None:
            say(f"resuming after {resume.name}")
        seconds = learn(args, model, tokenizer, train, evals, steps, lr, resume)
        say(f"trained in {clock(seconds)}")
    path = ll.save(model, args.out / session.ADAPTER)
    report(args.out, path)
    return 0


def check(args: Train) -> None:
    """Values that no later step would catch with a good sentence."""
    positive = ("batch_size", "accumulation", "keep") + (("steps",) if args.steps is not None else ())
    for name in positive:
        if getattr(args, name) < 1:
            raise ll.ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.")
    for name in ("eval_every", "save_every", "warmup", "clip", "weight_decay"):
        if not getattr(args, name) >= 0:
            raise ll.ConfigError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(args, name)}.")
    for name in ("epochs", "lr"):
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ll.ConfigError(f"--{name} must be positive, got {value}.")
    if args.best:
        check_best(args)
    if args.resume and args.overwrite:
        raise ll.ConfigError("--resume goes on with a run and --overwrite deletes it; give one of them.")


def check_best(args: Train) -> None:
    """Keeping the best checkpoint needs evaluations, and a checkpoint right after one."""
    if not (args.eval_every and args.eval_rows):
        raise ll.ConfigError("--best needs evaluations: set --eval-every and --eval-rows above 0.")
    if not args.save_every or args.save_every % args.eval_every:
        raise ll.ConfigError(
            "--best needs a checkpoint only after an evaluation: make --save-every a multiple of --eval-every "
            f"{args.eval_every}."
        )


def decisive(args: Train, cfg: ll.AdapterConfig, steps: int, lr: float) -> dict[str, Any]:
    """Everything that decides a run, as plain data."""
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name not in FREE}
    facts = {**values, "steps": steps, "lr": lr, "config": cfg.to_dict(), "version": ll.__version__}
    return json.loads(json.dumps(facts, default=str))


def learn(
    args: Train, model: Any, tokenizer: Any, train: Any, evals: Any, steps: int, lr: float, resume: Path | None
) -> float:
    """Run the training; returns its seconds."""
    import time

    from ._fit import Options, fit
    from ._log import RunLog

    options = Options(
        steps=steps,
        lr=lr,
        batch_size=args.batch_size,
        accumulation=args.accumulation,
        warmup=args.warmup,
        schedule=args.schedule,
        weight_decay=args.weight_decay,
        clip=args.clip,
        seed=args.seed,
        eval_every=args.eval_every,
        save_every=args.save_every,
        keep=args.keep,
        best=args.best,
        gradient_checkpointing=args.gradient_checkpointing,
        trainer=args.trainer,
    )
    start = time.monotonic()
    log = RunLog(args.out, f"{args.method} on {args.data}, seed {args.seed}")
    try:
        fit(model, tokenizer, train, evals, options, args.out, log, resume)
    except KeyboardInterrupt:
        found = sorted(args.out.glob("checkpoint-*"))
        hint = (
            "the same command with --resume goes on from the last checkpoint"
            if found
            else "no checkpoint had been written yet"
        )
        say(f"stopped; {hint}")
        raise
    return time.monotonic() - start


def report(out: Path, adapter: Path) -> None:
    """Where things are."""
    say(f"adapter  {adapter} ({adapter.stat().st_size / 1024:.0f} KiB)")
    for what, name in (("log", "log.jsonl"), ("picture", "loss.png")):
        if (out / name).is_file():
            say(f"{what:<8} {out / name}")
