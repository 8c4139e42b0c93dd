"""Why some methods do not learn wordmath in 200 steps at any rate: each again with the one setting changed that is
suspected, or with more steps.

    python benchmarks/why_not.py --rows benchmarks/results/why_not.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from lora_lite.bench import board
from lora_lite.bench.learn import Setting, run
from lora_lite.demo.learning import WordMath

TRIALS: tuple[tuple[str, float, int, dict[str, Any]], ...] = (
    ("loreft", 0.0243, 200, {"positions": "all"}),
    ("direft", 0.0243, 200, {"positions": "all"}),
    ("noreft", 0.0081, 200, {"positions": "all"}),
    ("cpt", 0.027, 200, {"epsilon": 7.9}),
    ("tinylora", 0.03, 200, {"r": 8, "u": 64}),
    ("prompt_tuning", 0.09, 1000, {}),
)
"""(method, rate, steps, what is changed); 7.9 at width 160 is a ball of the length of an embedding."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/results/why_not.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = {Setting.of(row).key: row for row in board.read(args.rows)}
    task = WordMath()
    for method, lr, steps, fields in TRIALS:
        setting = Setting(task.name, method, "select", 0, lr, steps, fields)
        row = known.get(setting.key)
        if row is None:
            row = run(task, setting, Path("runs/why_not"))
            board.add(args.rows, row)
        changed = ", ".join(f"{k}={v}" for k, v in fields.items()) or f"{steps} steps"
        print(
            f"{method:<14} {changed:<18} {row['accuracy']:.1%} right in validation, loss {row['loss']:.3f}", flush=True
        )


if __name__ == "__main__":
    main()
