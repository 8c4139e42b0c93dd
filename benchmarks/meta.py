"""Seconds that `ll.plan`, `ll.attach` and `ll.cost` take on models without weights: the shapes of Llama 3.1 on the meta
device.

Process time on one thread, all linear layers of the blocks; medians with quartiles of `--rounds` runs (`ll.cost` runs
once). A method that reads the weights' values cannot be attached without them and has a plan and a cost only. `python
benchmarks/meta.py [--json FILE]`
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import lora_lite as ll
from lora_lite.cli.plan import SHAPES, skeleton

GOAL = {"model": "llama-70b", "attach_s": 5.0}


def seconds(work: Callable[[], object], rounds: int, after: Callable[[], object] = lambda: None) -> dict[str, float]:
    """Quartiles of the time of `work`; `after` is not timed."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
        after()
    q1, q2, q3 = statistics.quantiles(times, n=4)
    return {"median": round(q2, 3), "q1": round(q1, 3), "q3": round(q3, 3)}


def measure(model: Any, method: str, rounds: int, length: int) -> dict[str, Any]:
    """One row."""
    variant = ll.get_variant(method)
    cfg = variant.config(variant=method)
    the_plan = ll.plan(model, cfg)
    row: dict[str, Any] = {"method": method, "targets": len(the_plan.targets), "trained": the_plan.trainable}
    row["plan_s"] = seconds(lambda: ll.plan(model, cfg), rounds)
    try:
        row["attach_s"] = seconds(lambda: ll.attach(model, cfg), rounds, lambda: ll.detach(model))
    except ll.WeightError:
        row["attach_s"] = None
    start = time.process_time()
    ll.cost(model, cfg, 1, length)
    row["cost_s"] = round(time.process_time() - start, 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--methods", nargs="+", default=["lora", "oft", "hra", "adalora", "dora"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--length", type=int, default=2048, help="tokens of the one row that ll.cost counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in args.models:
        model = skeleton(name)
        for method in args.methods:
            row = {"model": name, **measure(model, method, args.rounds, args.length)}
            rows.append(row)
            attach = f"{row['attach_s']['median']:6.3f}" if row["attach_s"] else "reads weights"
            print(
                f"{name:11} {method:8} {row['targets']:4} targets  plan {row['plan_s']['median']:6.3f} s  attach "
                f"{attach} s  cost {row['cost_s']:5.1f} s",
                flush=True,
            )
    if args.json:
        machine = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "processor": platform.machine(),
            "threads": 1,
        }
        data = {"machine": machine, "goal": GOAL, "rounds": args.rounds, "length": args.length, "rows": rows}
        args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
