"""Does it learn? Every trainable method on the bundled base and the task `wordmath`, each at its own recommended
learning rate.

One run per method: AdamW through `adapter.param_groups`, cosine decay over the budget of CPU time, the same batches for
all. A few steps on a copy of the model measure the step time first, which fixes the number of steps. The JSON is
extended method by method, so a stopped run goes on where it was; the table is generated from it.

    python benchmarks/learn.py --seconds 90 --json benchmarks/results/learn.json --table docs/results/learn.md

A second look at a method that learnt little, with another learning rate or size, goes into a table of its own:

    python benchmarks/learn.py --second-look --methods lora_xs --set r=32 --lr 0.016 \
        --json benchmarks/results/learn.json --table docs/results/learn.md
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import platform
import random
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import lora_lite as ll
from lora_lite.data.batches import collate
from lora_lite.data.tokens import tokenised
from lora_lite.demo.data import load_model, wordmath_rows
from lora_lite.demo.evaluate import evaluate
from lora_lite.demo.wordmath import generate


def prepared(tokenizer: Any) -> list[dict[str, list[int]]]:
    return tokenised(wordmath_rows("train", 12000), tokenizer, 256).rows


def batch_at(step: int, rows: list[dict[str, list[int]]], size: int, pad: int, seed: int) -> dict[str, torch.Tensor]:
    """Rows of like length: a function of (seed, step), so that all methods see the same."""
    rng = random.Random(f"{seed}-{step}")
    pool = sorted(rng.sample(rows, size * 4), key=lambda r: len(r["input_ids"]))
    k = rng.randrange(4)
    return collate(pool[k * size : (k + 1) * size], pad)


def attached(name: str, rows: list, pad: int, seed: int, base: str, changes: dict) -> tuple[Any, Any, Any, float]:
    model, tokenizer = load_model(base)
    variant = ll.get_variant(name)
    cfg = variant.config(variant=name, seed=seed, **changes)
    data = [batch_at(-1 - i, rows, 16, pad, seed) for i in range(4)] if variant.needs_data else None
    start = time.perf_counter()
    handle = ll.attach(model, cfg, calibration_data=data)
    return model, tokenizer, handle, time.perf_counter() - start


def train(
    model: Any,
    handle: Any,
    lr: float,
    steps: int,
    rows: list,
    size: int,
    pad: int,
    seed: int,
    seconds: float = math.inf,
) -> tuple[int, float, list[float]]:
    torch.manual_seed(seed)
    opt = torch.optim.AdamW(handle.param_groups(lr, weight_decay=0.0))
    rates = [g["lr"] for g in opt.param_groups]
    if handle.record.variant.on_step is not None:
        ll.schedule(model, opt, steps)
    model.train()
    losses, start = [], time.process_time()
    for step in range(steps):
        shape = min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, rate in zip(opt.param_groups, rates, strict=True):
            group["lr"] = rate * shape
        loss = model(**batch_at(step, rows, size, pad, seed)).loss
        total = loss + ll.penalty(model) if handle.record.variant.penalty is not None else loss
        total.backward()
        torch.nn.utils.clip_grad_norm_(list(handle.parameters()), 1.0)
        opt.step()
        opt.zero_grad()
        losses.append(float(loss.detach()))
        if time.process_time() - start > seconds:
            break
    return len(losses), time.process_time() - start, losses


def run(name: str, args: argparse.Namespace) -> dict:
    variant = ll.get_variant(name)
    lr = args.lr or args.lr_scale * variant.lr
    model, tokenizer = load_model(args.base)
    pad, rows = tokenizer.pad_token_id, prepared(tokenizer)
    model, tokenizer, handle, attach_s = attached(name, rows, pad, args.seed, args.base, args.set)
    probe = copy.deepcopy(model)
    with contextlib.redirect_stderr(None):
        train(probe, ll.adapters(probe)["default"], lr, 4, rows, args.batch, pad, args.seed)
        done, elapsed, _ = train(probe, ll.adapters(probe)["default"], lr, 16, rows, args.batch, pad, args.seed)
    del probe
    steps = max(20, int(args.seconds / (elapsed / done)))
    done, elapsed, losses = train(
        model, handle, lr, steps, rows, args.batch, pad, args.seed, seconds=1.5 * args.seconds
    )
    answers = evaluate(model, tokenizer, generate("test", args.problems, 0), batch_size=100)
    tail = losses[-max(1, len(losses) // 20) :]
    return {
        "method": name,
        "set": args.set,
        "lr": round(lr, 8),
        "accuracy": round(answers.accuracy, 4),
        "trained": handle.num_parameters(),
        "steps": done,
        "ms_per_step": round(1000 * elapsed / done, 1),
        "seconds": round(elapsed, 1),
        "attach_s": round(attach_s, 2),
        "first_loss": round(losses[0], 3),
        "last_loss": round(sum(tail) / len(tail), 3),
        "problems": args.problems,
        "seed": args.seed,
    }


def table(data: dict) -> str:
    rows = sorted(data["rows"], key=lambda r: -r["accuracy"])
    n = rows[0]["problems"]
    lines = [
        "# Does it learn?",
        "",
        f"Exact match on {n} test problems of `wordmath`, the generated word problems of the package, after "
        f"{data['seconds']:g} s of CPU time of training on the bundled base, one thread, each method once at its "
        f"default size and at {data['lr_scale']:g} times its recommended learning rate, which is meant for models "
        f"thousands wide; this one is 160 wide (seed {rows[0]['seed']}). The bare base scores "
        f"{data['base_accuracy']:.1%}. The standard error of a share near 50 % is "
        f"{100 * math.sqrt(0.25 / n):.1f} points, and the machine was shared: read groups, not ranks. "
        "Generated by `benchmarks/learn.py`.",
        "",
        "| method | accuracy | trained parameters | lr | steps | step vs lora | last loss |",
        "|---|---|---|---|---|---|---|",
    ]
    reference = next((r["ms_per_step"] for r in rows if r["method"] == "lora"), None)
    for r in rows:
        ratio = f"{r['ms_per_step'] / reference:.2f}" if reference else "-"
        lines.append(
            f"| {r['method']} | {r['accuracy']:.1%} | {r['trained']:,} | {r['lr']:g} | {r['steps']} | {ratio} | "
            f"{r['last_loss']:.3f} |"
        )
    missing = [v.name for v in ll.variants() if v.trains and v.name not in {r["method"] for r in rows}]
    if missing:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    if data.get("second_look"):
        lines += second_table(data)
    return "\n".join(lines) + "\n"


def second_table(data: dict) -> list[str]:
    first = {r["method"]: r for r in data["rows"]}
    lines = [
        "",
        "## A second look",
        "",
        "Methods that learnt about half of the problems or less, with another learning rate or size. Everything else "
        "is as above.",
        "",
        "| method | above | at lr | change | accuracy | trained parameters | steps | last loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(data["second_look"], key=lambda r: (r["method"], r["lr"])):
        above = first[r["method"]]
        change = ", ".join(f"{k}={v}" for k, v in r["set"].items()) or "-"
        lines.append(
            f"| {r['method']} | {above['accuracy']:.1%} at lr {above['lr']:g} | {r['lr']:g} | {change} | "
            f"{r['accuracy']:.1%} | {r['trained']:,} | {r['steps']} | {r['last_loss']:.3f} |"
        )
    if data.get("findings"):
        lines += ["", "What that says:", ""]
        lines += [f"- **{names}**: {text}" for names, text in data["findings"].items()]
    return lines


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON or else as a string."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trainable = [v.name for v in ll.variants() if v.trains]
    parser.add_argument("--methods", nargs="+", default=trainable, choices=trainable)
    parser.add_argument("--base", default="demo")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--lr", type=float, help="instead of the recommended one")
    parser.add_argument(
        "--lr-scale",
        type=float,
        default=4.0,
        help="factor on the recommended learning rates, which are meant for wide models",
    )
    parser.add_argument(
        "--set", nargs="+", type=setting, default=[], metavar="FIELD=VALUE", help="fields of the config"
    )
    parser.add_argument("--second-look", action="store_true", help="add to the second table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("runs/learn.json"))
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    args.set = dict(args.set)
    if args.set and not args.second_look:
        parser.error("--set belongs to --second-look: the first table holds every method at its default size.")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {"rows": []}
    if "base_accuracy" not in data:
        model, tokenizer = load_model(args.base)
        data["base_accuracy"] = evaluate(model, tokenizer, generate("test", args.problems, 0), batch_size=100).accuracy
        data["seconds"], data["lr_scale"] = args.seconds, args.lr_scale
        data["machine"] = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": 1,
            "cpu": platform.machine(),
        }
    rows = data.setdefault("second_look", []) if args.second_look else data["rows"]
    for name in args.methods:
        seen = {"method": name} | ({"lr": args.lr, "set": args.set} if args.second_look else {})
        if any(r.items() >= seen.items() for r in rows):
            continue
        try:
            row = run(name, args)
        except ll.LoraLiteError as e:
            print(f"{name}: {type(e).__name__}: {e}", flush=True)
            continue
        print(json.dumps(row), flush=True)
        rows.append(row)
        args.json.write_text(json.dumps(data, indent=1) + "\n")
    if args.table and data["rows"]:
        args.table.parent.mkdir(parents=True, exist_ok=True)
        args.table.write_text(table(data))


if __name__ == "__main__":
    main()
