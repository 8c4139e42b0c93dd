"""`lora-lite demo`: the bundled base learns word problems, with figures before and after. No download, no GPU."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lora_lite as ll

from . import _folder as folder
from . import _session as session
from ._base import BaseFlags, check_seed, load_base, quiet
from ._console import Bar, clock, say, table
from ._method import build_config, check_ignored
from ._shown import one_line, right

TRAIN_ROWS, EVAL_ROWS, BATCH, LENGTH = 6400, 100, 16, 256
FACTOR = 5.0
"""The recommended rates are for models of useful size; one a thousand times smaller takes larger steps."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train an adapter on the bundled base model: accuracy on unseen word problems before and after, in a few minutes
    on a CPU.

    Writes the adapter, a log of every step and a picture of the losses.
    """

    method: str = "lora"
    seed: int = 0
    """Seed of the adapter, of the training problems and of their order. The test problems are always the same."""
    seconds: float = 220.0
    """Time for all of it; fewer steps are trained if --steps would not fit."""
    steps: int = 400
    """Optimiser steps of 16 problems."""
    lr: float | None = None
    """Learning rate; None: five times the one recommended for the method, since the base is so small."""
    problems: int = 200
    """Test problems."""
    out: Path | None = None
    """Folder for what is written; None: runs/demo-METHOD-SEED, replaced by each run."""
    overwrite: bool = False
    """Replace a run that --out holds."""
    threads: int = 1
    """CPU threads; 0: torch's choice. One is as fast for so small a model when anything else runs beside it."""
    debug: bool = False
    """Show tracebacks and other libraries' messages."""


def run(args: Demo) -> int:
    if args.steps < 1 or args.problems < 1 or not args.seconds > 0 or (args.lr is not None and not args.lr > 0):
        raise ll.ConfigError("--steps, --problems, --seconds and --lr must be positive.")
    check_seed(args.seed)
    start = time.monotonic()
    cfg = build_config(args)
    check_ignored(args, cfg)
    variant = ll.get_variant(cfg.variant)
    out = Path("runs") / f"demo-{cfg.variant}-{args.seed}" if args.out is None else args.out
    overwrite = args.overwrite or args.out is None
    folder.check_folder(out, overwrite)
    quiet(args.debug)
    from ..data.tokens import tokenised
    from ..demo.data import wordmath_rows
    from ..demo.evaluate import evaluate
    from ..demo.wordmath import generate

    model, tokenizer = load_base(BaseFlags(base_dtype="float32", threads=args.threads), "demo", args.seed)
    size = sum(p.numel() for p in model.parameters())
    say(f"base: bundled Llama, {size:,} parameters. Task: word problems, {args.problems} for the test")
    problems = generate("test", args.problems)
    train = tokenised(wordmath_rows("train", TRAIN_ROWS, args.seed), tokenizer, LENGTH).rows
    evals = tokenised(wordmath_rows("validation", EVAL_ROWS), tokenizer, LENGTH).rows

    mark = time.monotonic()
    with Bar("answering before", len(problems)) as bar:
        before = evaluate(model, tokenizer, problems, progress=bar.hook)
    answering = time.monotonic() - mark
    say(f"accuracy before: {before.accuracy:.1%}")

    adapter = session.attach(model, cfg, None, train, BATCH, tokenizer, pairs=True)
    with folder.opened(out):
        lr = FACTOR * variant.lr if args.lr is None else args.lr
        left = args.seconds - (time.monotonic() - start) - 1.2 * answering - 3
        steps = learn(args, variant, model, tokenizer, train, evals, out, lr, left)
        with Bar("answering after", len(problems)) as bar:
            after = evaluate(model, tokenizer, problems, progress=bar.hook)
        path = ll.save(model, out / folder.ADAPTER)
        seconds = time.monotonic() - start
        facts = {
            "model": "demo",
            "method": variant.name,
            "config": cfg.to_dict(),
            "seed": args.seed,
            "steps": steps,
            "lr": lr,
            "trained": adapter.num_parameters(),
            "problems": len(problems),
            "accuracy_before": before.accuracy,
            "accuracy_after": after.accuracy,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(time.process_time(), 1),
            "version": ll.__version__,
        }
        folder.write_run(out, facts)
    show(problems, before, after, seconds, args.seed)
    report(out, path)
    return 0


def learn(
    args: Demo,
    variant: type[ll.Variant],
    model: Any,
    tokenizer: Any,
    train: list[dict[str, list[int]]],
    evals: list[dict[str, list[int]]],
    out: Path,
    lr: float,
    seconds: float,
) -> int:
    """As many steps as fit into the seconds, and say so; returns their number, 0 for a method that is only fitted."""
    from ._fit import Options, fit
    from ._log import RunLog

    if variant.needs_data == "pairs":
        say(f"{variant.name} is not trained: fitted on right completions against those of other problems")
    if not variant.trains:
        return 0
    steps = affordable(args.steps, seconds, model, tokenizer, train)
    less = f" (of {args.steps}, to keep within --seconds {args.seconds:g})" if steps < args.steps else ""
    trained, size = (sum(p.numel() for p in model.parameters() if p.requires_grad or all_) for all_ in (False, True))
    say(
        f"training {variant.name}: {trained:,} parameters ({trained / (size - trained):.2%}), {steps} steps{less}, "
        f"lr {lr:g}, seed {args.seed}"
    )
    options = Options(steps=steps, lr=lr, batch_size=BATCH, seed=args.seed, eval_every=math.ceil(steps / 6))
    log = RunLog(out, f"{variant.name} on wordmath, seed {args.seed}")
    fit(model, tokenizer, train, evals, options, out, log)
    return steps


def affordable(wanted: int, seconds: float, model: Any, tokenizer: Any, rows: list[dict[str, list[int]]]) -> int:
    """At most `wanted` steps, as many as fit into the time; one pass is timed after one to warm up."""
    from ..data.batches import collate

    batch = {k: v.to(model.device) for k, v in collate(rows[:BATCH], tokenizer.pad_token_id).items()}
    model.eval()  # gradients flow all the same, and no method counts it as a training step
    one = math.inf
    for _ in range(2):
        mark = time.monotonic()
        model(**batch).loss.backward()
        one = time.monotonic() - mark
    model.zero_grad(set_to_none=True)
    return max(1, min(wanted, int(seconds / (1.15 * one))))


def show(problems: Any, before: Any, after: Any, seconds: float, seed: int) -> None:
    """The figures, and three answers."""
    say()
    table(
        ("wordmath test", "right", "accuracy"),
        [
            (name, f"{round(a.accuracy * len(problems))} of {len(problems)}", f"{a.accuracy:.1%}")
            for name, a in (("base", before), ("with the adapter", after))
        ],
    )
    for i in (0, 1, 2)[: len(problems)]:
        p = problems[i]
        say()
        say(one_line(p.prompt, 400))
        say(f"  base     {one_line(before.completions[i], 100)}", "dim")
        ok = right(after.completions[i], p.completion)
        say(f"  adapted  {one_line(after.completions[i], 100)}", "green" if ok else "yellow")
        say(f"  right    {one_line(p.completion, 100)}")
    say()
    say(f"{clock(seconds)} in all")


def report(out: Path, adapter: Path) -> None:
    """Where things are, and what to type next."""
    from .train import report as where

    where(out, adapter)
    say(f"{'figures':<8} {out / folder.RUN}")
    say(f"next     lora-lite eval --adapter {out}")
