"""`lora-lite train`: any method, any causal model, wordmath or rows of one's own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lora_lite as ll

from ..core.errors import did_you_mean
from ..data.forms import Row, layout_of, preferred
from ..data.packing import packed
from ..data.tokens import Prepared, Tokens
from . import _folder as folder
from . import _session as session
from ._base import BaseFlags, check_base, check_seed, load_base, processes, quiet
from ._console import clock, divert, is_first, say, table
from ._log import LOG
from ._method import build_config, check_ignored
from ._notice import check_packing, untrained_tokens
from ._rows import Reader, RowFlags, check_data, fingerprint, held_out, reader_of
from ._settings import write_settings
from ._shown import compare, show_tokens

FREE = ("resume", "overwrite", "dry_run", "debug", "threads", "adapter", "out", "keep", "epochs", "samples", "config",
        "preset", "device", "report_to", "score", "json")  # fmt: skip
"""Flags that may differ when a run is resumed."""
PAIRS_RATE = 0.1
"""Preference pairs take a tenth of the rate that examples do."""
NARROW = 1024
"""Width below which recommended rates are small, which were found on models thousands wide."""
Rows = list[dict[str, Any]]
SHOWN = 3
"""Rows that are shown as the model sees them."""


@dataclass(frozen=True, kw_only=True)
class Train(RowFlags, BaseFlags):
    """Train an adapter and write it, its settings, a log of every step and a picture of the losses into a folder.

    The same command with --resume goes on from the last checkpoint, to the same bits as a run without interruption.
    """

    config: Path | None = None
    """Settings as YAML or JSON, such as the run.yaml of another run; flags that are given win."""
    preset: Literal["small", "quality", "memory"] | None = None
    """Settings for people who know no ranks: a small file, the best result, the least memory (4-bit base)."""
    data: str = "wordmath"
    """wordmath (word problems that the package generates); a JSONL, JSON, CSV or Parquet file; - for JSONL on standard
    input; or a data set of the hub as NAME or NAME:SPLIT. Columns: text, prompt and completion, messages, Alpaca's, or
    ShareGPT's."""
    eval_data: str | None = None
    """Rows for the eval loss. None: the validation split of wordmath, or a part of the data, held out."""
    out: Path | None = None
    """Folder for the adapter, its settings, log, picture and checkpoints. None: runs/train, or the first of
    runs/train-2, runs/train-3, ... that holds no run."""
    method: str = "lora"
    init_from: Path | None = None
    """Adapter whose tensors the training begins with, of the same method and sizes."""
    rows: int | None = None
    """At most so many rows; None: all (2,000 of wordmath)."""
    eval_rows: float = 200
    """At most so many eval rows (of the data, a tenth at most); below 1: that share of the data; 0: no evaluation."""
    steps: int | None = None
    """Optimiser steps; None: as many as --epochs makes. More may be given with --resume."""
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
    bf16: bool = False
    """Run the forward pass in bf16 autocast."""
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
    patience: int = 0
    """Stop after so many evaluations in a row without a lower eval loss; 0: never."""
    trainer: Literal["hf", "sft", "dpo"] = "hf"
    """transformers' Trainer, TRL's SFTTrainer, or its DPOTrainer for preference pairs: rows with prompt, chosen and
    rejected."""
    beta: float = 0.1
    """How firmly DPO holds on to the model it began with."""
    packing: bool = False
    """Put several short rows into one of --max-length tokens, none of which sees another: no time for padding."""
    report_to: tuple[str, ...] = ()
    """Trackers that also receive the figures: tensorboard, trackio, wandb, ..."""
    samples: int = 3
    """Answers of base and adapter to show side by side at the end."""
    score: int = 40
    """At most so many eval rows are answered at the end by base and adapter, where short answers can be compared; 0:
    none."""
    resume: bool = False
    """Go on from the last checkpoint in --out."""
    overwrite: bool = False
    """Replace a run that --out holds, once the new one has ended."""
    dry_run: bool = False
    """Show the plan, the steps and the tokens, and do nothing."""
    json: bool = False
    """Print one JSON object at the end; everything else goes to stderr."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run is made of, once everything has been read and checked."""

    args: Train
    cfg: ll.AdapterConfig
    out: Path
    reader: Reader
    train: Rows
    evals: Rows
    """Tokens; of preference pairs the rows themselves, of which TRL makes tokens."""
    seen: list[Tokens]
    """Tokens of the training rows one by one, as they are shown and as methods with a start from data read them."""
    asked: list[dict[str, Any]]
    """Rows whose answers are shown at the end."""
    origin: str
    steps: int
    lr: float
    resume: Path | None


def run(args: Train) -> int:
    divert(args.json)
    check(args)
    cfg = build_config(args)
    check_ignored(args, cfg)
    check_data(args.data)
    if args.eval_data is not None:
        check_data(args.eval_data)
    quiet(args.debug)
    out, resume = place(args)
    work = prepared(args, cfg, out, resume)
    if args.dry_run:
        return show_plan(work)
    if resume is not None:
        folder.check_same_run(out, decisive(work))
    model, tokenizer = load_base(args, args.model, args.seed)
    tokenizer.chat_template = work.reader.tokenizer.chat_template
    for line in untrained_tokens(model, tokenizer, work.seen):
        say(f"note: {line}")
    if args.packing:
        check_packing(model, work.train)
    adapter = session.attach(
        model, cfg, args.calibration_batches, work.seen, args.batch_size, tokenizer, reference=args.reference_weights
    )
    if args.init_from is not None and resume is None:
        start_from(model, adapter, args.init_from)
    variant = ll.get_variant(cfg.variant)
    say(
        f"{variant.name}: {adapter.num_parameters():,} trained parameters on {len(adapter.targets)} layers of "
        f"{args.model}"
    )
    facts: dict[str, Any] = {"out": str(out), "method": variant.name, "trained": adapter.num_parameters()}
    with folder.opened(out, fresh=resume is None) if is_first() else contextlib.nullcontext():
        if is_first():
            folder.write_run(out, decisive(work) | {folder.LAYOUT: layout(work)})
            write_settings(out / folder.SETTINGS, "train", args)
        if variant.trains:
            facts |= learn(work, model, tokenizer)
        path = ll.save(model, out / folder.ADAPTER) if is_first() else out / folder.ADAPTER
    if not is_first():
        return 0
    facts |= {"adapter": str(path), **compare(model, tokenizer, work.asked, args.samples, args.score)}
    say()
    report(out, path)
    typed = shlex.quote(str(out))
    say(f"next     lora-lite chat {typed}")
    say(f"         lora-lite eval --adapter {typed}")
    say(f"         lora-lite merge {typed} --out {shlex.quote(str(out / 'merged'))}")
    if args.json:
        print(json.dumps(facts))
    return 0


def place(args: Train) -> tuple[Path, Path | None]:
    """The folder of the run, and the checkpoint from which it goes on."""
    out = args.out if args.out is not None else Path("runs/train")
    if args.resume:
        resume, damage = folder.last_checkpoint(out)
        for line in damage:
            say(line)
        return out, resume
    number = 1
    while args.out is None and not args.overwrite and folder.own_files(out):
        number += 1
        out = Path(f"runs/train-{number}")
    if not args.dry_run and is_first():
        folder.check_folder(out, args.overwrite)
    return out, None


def prepared(args: Train, cfg: ll.AdapterConfig, out: Path, resume: Path | None) -> Work:
    """Rows, tokens, steps and rate, before the model is loaded; what should be known of them is said."""
    reader = reader_of(args, args.model)
    rows, held, origin = divided(args, reader)
    pairs = args.trainer == "dpo"
    check_pairs(rows + held, pairs, args.data)
    made = reader.tokens([preferred(row) for row in rows])
    evals = reader.tokens([preferred(row) for row in held]) if held else None
    say_of(reader, made, evals)
    if not made.rows:
        raise ll.FileError(f"{args.data} leaves no row to train on; raise --max-length or lower --eval-rows.")
    train: Rows = [rows[i] for i in made.kept] if pairs else made.rows
    if args.packing:
        train = packed(made.rows, reader.max_length)
        say(f"{len(made.rows):,} rows are packed into {len(train):,}")
    kept: Rows = evals.rows if evals else []
    return Work(
        args=args, cfg=cfg, out=out, reader=reader, train=train, evals=held if pairs else kept, seen=made.rows,
        asked=[preferred(row) for row in held or rows], origin=origin, steps=steps_of(args, len(train)),
        lr=rate_of(args, cfg), resume=resume,
    )  # fmt: skip


def say_of(reader: Reader, made: Prepared, evals: Prepared | None) -> None:
    """What became of the rows; of those held out, only what they lost."""
    for line in reader.remarks(made):
        say(f"note: {line}")
    if evals is not None and evals.lost + evals.cut:
        for line in reader.remarks(evals):
            say(f"note: of the eval rows, {line}")


def steps_of(args: Train, rows: int) -> int:
    """Optimiser steps of the run.

    Raises:
        ConfigError: the warm-up would fill them all.
    """
    steps = args.steps if args.steps is not None else math.ceil(rows * args.epochs / rows_a_step(args))
    if args.warmup >= max(1, steps):
        raise ll.ConfigError(
            f"--warmup {args.warmup:g} is as long as the whole run of {steps} steps, so the rate would never reach its "
            "height; give fewer, or a share below 1."
        )
    return steps


def rate_of(args: Train, cfg: ll.AdapterConfig) -> float:
    """The learning rate: the one given, or the method's."""
    if args.lr is not None:
        return args.lr
    return ll.get_variant(cfg.variant).lr * (PAIRS_RATE if args.trainer == "dpo" else 1)


def rate_advice(args: Train, lr: float, model: Any) -> str | None:
    """What to try where the recommended rate is given to a model much narrower than those that it was found on."""
    from ..runtime.targets.structure import describe

    width = describe(model).d_model if args.lr is None else None
    if width is None or width >= NARROW:
        return None
    tries = ", ".join(f"{factor * lr:g}" for factor in (3, 9, 27))
    return (
        f"lr {lr:g} is recommended for models thousands wide, and this one is {width}: the narrower, the larger the "
        f"step that it bears. Compare --lr {tries} on held-out rows (docs/choosing.md)."
    )


def divided(args: Train, reader: Reader) -> tuple[list[Row], list[Row], str]:
    """(rows to train on, rows to evaluate on, where the latter come from)."""
    rows = reader.rows(args.data, "train", args.rows, args.seed)
    if not (args.eval_rows and args.eval_every):
        return rows, [], "nothing"
    if args.eval_data is None and args.data != "wordmath":
        rows, held = held_out(rows, args.eval_rows, args.seed)
        return rows, held, f"{len(held)} rows held out of {args.data}"
    held = reader.rows(args.eval_data or args.data, "validation", max(1, int(args.eval_rows)), 0)
    return rows, held, f"{len(held)} rows of {args.eval_data or 'the validation split'}"


def check_pairs(rows: Sequence[Row], wanted: bool, source: str) -> None:
    """Preference pairs are for DPO, and DPO is for them.

    Raises:
        ConfigError: rows of the other kind.
    """
    n = sum("chosen" in row for row in rows)
    if wanted and n < len(rows):
        raise ll.ConfigError(f"--trainer dpo needs rows with prompt, chosen and rejected; in {source} {n} have them.")
    if n and not wanted:
        raise ll.ConfigError(f"{source} holds preference pairs (chosen, rejected): add --trainer dpo.")


def rows_a_step(args: Train) -> int:
    """Rows of one optimiser step, over all processes."""
    return args.batch_size * args.accumulation * processes()


def show_plan(work: Work) -> int:
    """The plan, the rows as the model sees them, the steps and the tokens."""
    from .plan import show, skeleton

    args, train = work.args, work.train
    show(ll.plan(skeleton(args.model), work.cfg))
    average = sum(len(r["input_ids"]) for r in work.seen) / len(train)
    per_step = rows_a_step(args)
    table(
        ("what", "value"),
        [
            ("training rows", f"{len(train):,}"),
            ("eval rows", f"{len(work.evals):,} ({work.origin})"),
            ("steps", f"{work.steps:,} of {per_step} rows ({work.steps * per_step / len(train):.2f} epochs)"),
            ("tokens", f"{round(average * work.steps * per_step):,} (padding not counted)"),
            ("learning rate", f"{work.lr:g} ({args.schedule})"),
            ("out", str(work.out)),
        ],
    )
    show_tokens(work.seen[:SHOWN], work.reader.tokenizer)
    return 0


def check(args: Train) -> None:
    """Values that no later step would catch with a good sentence."""
    check_base(args)
    check_seed(args.seed)
    check_numbers(args)
    if args.packing and args.trainer == "dpo":
        raise ll.ConfigError("--packing is for rows of text; preference pairs are not packed. Leave the flag out.")
    if args.best or args.patience:
        check_best(args)
    if args.resume and args.overwrite:
        raise ll.ConfigError("--resume goes on with a run and --overwrite deletes it; give one of them.")
    check_trackers(args.report_to)
    if args.init_from is not None and not args.init_from.exists():
        raise ll.FileError(f"--init-from {args.init_from}: there is no such file.")


def check_numbers(args: Train) -> None:
    """Numbers that lie where they may."""
    positive = ("batch_size", "accumulation", "keep")
    for name in positive + tuple(n for n in ("steps", "rows") if getattr(args, n) is not None):
        if getattr(args, name) < 1:
            raise ll.ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.")
    from_zero = ("eval_every", "eval_rows", "save_every", "warmup", "clip", "weight_decay", "patience")
    for name in (*from_zero, "samples", "score"):
        if not getattr(args, name) >= 0:
            raise ll.ConfigError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(args, name)}.")
    for name in ("epochs", "lr", "beta"):
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ll.ConfigError(f"--{name} must be positive, got {value}.")
    if args.max_length is not None and args.max_length < 2:
        raise ll.ConfigError(f"--max-length must be at least 2, got {args.max_length}.")


def check_trackers(names: Sequence[str]) -> None:
    """Whether each tracker exists and its package is here, before anything is loaded.

    Raises:
        ConfigError: one is unknown or missing.
    """
    if not names:
        return
    from transformers.integrations import integration_utils as trackers

    known, here = list(trackers.INTEGRATION_TO_CALLBACK), trackers.get_available_reporting_integrations()
    for name in names:
        if name not in (*known, "all", "none"):
            near = did_you_mean(name, known, 1)
            raise ll.ConfigError(f"--report-to {name}: there is no such tracker.{near} There are: {', '.join(known)}.")
        if name in known and name not in here:
            raise ll.ConfigError(f"--report-to {name} needs its package: pip install {name.replace('_', '-')}")


def check_best(args: Train) -> None:
    """Stopping early and keeping the best need evaluations, the latter a checkpoint right after one."""
    flag = "--best" if args.best else "--patience"
    if not (args.eval_every and args.eval_rows):
        raise ll.ConfigError(f"{flag} needs evaluations: set --eval-every and --eval-rows above 0.")
    if args.best and (not args.save_every or args.save_every % args.eval_every):
        raise ll.ConfigError(
            "--best needs a checkpoint only after an evaluation: make --save-every a multiple of --eval-every "
            f"{args.eval_every}."
        )


def layout(work: Work) -> str | None:
    """The chat template by which `chat` and `serve` ask as the rows did."""
    if work.args.template is not None:
        return work.reader.tokenizer.chat_template
    tokenizer = work.reader.tokenizer
    opening = tokenizer("")["input_ids"]
    bos = bool(opening) and opening[0] == tokenizer.bos_token_id
    return layout_of(work.asked[0], work.args.data == "wordmath", work.reader.chat, bos)


def decisive(work: Work) -> dict[str, Any]:
    """Everything that decides a run, as plain data."""
    args = work.args
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name not in FREE}
    facts = {
        **values,
        "steps": work.steps,
        "lr": work.lr,
        "max_length": work.reader.max_length,
        "config": work.cfg.to_dict(),
        "tokens": fingerprint(work.train),
        "version": ll.__version__,
    }
    return json.loads(json.dumps(facts, default=str))


def start_from(model: Any, adapter: ll.Adapter, given: Path) -> None:
    """Copy the tensors of another adapter into the fresh one.

    Raises:
        FileError: it has other targets, sizes or another method.
    """
    from ..io import native
    from ..io.header import config_from_header

    path = folder.adapter_path(given)
    head, tensors = native.read(path)
    method = config_from_header(head, str(path)).variant
    if method != adapter.cfg.variant:
        raise ll.FileError(f"--init-from {path} is of method {method!r}, and this run trains {adapter.cfg.variant!r}.")
    native.check_keys(native.expected(adapter.record), tensors, str(path))
    ll.load_adapter_state_dict(model, adapter.name, tensors)


def learn(work: Work, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Run the training and return its figures; what is left of a run that has ended already is loaded."""
    args, resume = work.args, work.resume
    if resume is not None and folder.step_of(resume) >= work.steps:
        from ..interop.trainer import load_checkpoint

        load_checkpoint(model, resume)
        say(f"the run has ended already, after step {folder.step_of(resume)}: nothing is trained. Give more --steps.")
        return {}
    per_step = rows_a_step(args)
    evaluated = work.origin if work.evals else "nothing"
    say(f"{work.steps} steps of {per_step} rows of {args.data}, lr {work.lr:g}; eval on {evaluated}")
    if advice := rate_advice(args, work.lr, model):
        say(advice)
    if resume is not None:
        say(f"resuming after {resume.name}")
    else:
        say("as the model sees the first rows, what is learned marked:")
        show_tokens(work.seen[:SHOWN], tokenizer)
    return fit_and_say(work, model, tokenizer)


def fit_and_say(work: Work, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Train, say how it ended, and return the figures."""
    from ._fit import Options, fit, last_figures
    from ._log import RunLog

    args = work.args
    same = {f.name for f in dataclasses.fields(Options)} & {f.name for f in dataclasses.fields(args)}
    values = {name: getattr(args, name) for name in same} | {"steps": work.steps, "lr": work.lr}
    log = RunLog(work.out, f"{args.method} on {args.data}, seed {args.seed}")
    before = folder.step_of(work.resume) if work.resume is not None else 0  # that checkpoint may be gone at the end
    start = time.monotonic()
    try:
        trainer = fit(model, tokenizer, work.train, work.evals, Options(**values), work.out, log, work.resume)
    except KeyboardInterrupt:
        say(stopped(work.out))
        raise
    seconds = time.monotonic() - start
    old = max((row["tokens"] for row in log.rows if "tokens" in row and row["step"] <= before), default=0)
    say(last_figures(log, seconds, int(trainer.state.num_input_tokens_seen) - old))
    if trainer.state.global_step < work.steps:
        say(f"stopped early: {args.patience} evaluations without a lower eval loss")
    facts: dict[str, Any] = {"steps": int(trainer.state.global_step), "seconds": round(seconds, 1), "lr": work.lr}
    facts["loss"] = next((row["loss"] for row in reversed(log.rows) if "loss" in row), None)
    evals = [row["eval_loss"] for row in log.rows if "eval_loss" in row]
    if evals:
        facts |= {"eval_loss_before": evals[0], "eval_loss": min(evals) if args.best else evals[-1]}
        say(f"eval loss {evals[0]:.4f} before, {facts['eval_loss']:.4f} after {clock(seconds)}")
    return facts


def stopped(out: Path) -> str:
    """After Ctrl-C: what is kept, and the line that goes on."""
    found = folder.checkpoints(out)
    line = shlex.join(["lora-lite", "train", "--config", str(out / folder.SETTINGS), "--out", str(out)])
    if not (out / LOG).is_file():
        return "stopped before the first step; the same command begins anew"
    if found:
        return f"stopped; {found[-1].name} is kept, and this goes on from there: {line} --resume"
    return f"stopped before the first checkpoint; this begins anew: {line} --overwrite"


def report(out: Path, adapter: Path) -> None:
    """Where things are."""
    say(f"adapter  {adapter} ({adapter.stat().st_size / 1024:.0f} KiB)")
    for what, name in (("log", "log.jsonl"), ("picture", "loss.png"), ("settings", folder.SETTINGS)):
        if (out / name).is_file():
            say(f"{what:<8} {out / name}")
