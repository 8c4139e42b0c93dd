"""Seconds that attaching takes against PEFT, from a loaded model to one that can train: starts from nothing, from the
weights and from data.

Interleaved in one process (PEFT, ours, repeat), one thread, process time; both sides get a fresh copy of the same model
and the same batches; medians of paired ratios with quartiles. PEFT's start from data is the call its documentation
names, on the same batches.

    python benchmarks/attach.py --json benchmarks/results/attach.json --table docs/results/attach.md
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import platform
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import lora_lite as ll
from lora_lite.bench import speed

GOALS = {"pissa": 0.5, "eva": 0.5, "lora_ga": 1.0}
SLOW = {"eva": 3, "corda": 3}
"""Rounds at most where PEFT takes long."""


def batches(n: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, speed.VOCABULARY, (n, 4, 128), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": i, "labels": i, "attention_mask": torch.ones_like(i)} for i in ids]


def config(r: int, **more: Any) -> Any:
    import peft

    return peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=speed.ALL, **more)


def plain(**more: Any) -> Callable[[Any, int, list], object]:
    def attach(model: Any, r: int, data: list) -> object:
        import peft

        return peft.get_peft_model(model, config(r, **more))

    return attach


def eva(model: Any, r: int, data: list) -> object:
    import peft

    cfg = config(r, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
    theirs = peft.get_peft_model(model, cfg, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(theirs, data, show_progress_bar=False)
    return theirs


def corda(model: Any, r: int, data: list) -> object:
    import peft

    sys.modules.setdefault("attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))  # all that PEFT asks of it
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    cfg = config(r, init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"))

    def run() -> None:
        with torch.no_grad():
            for batch in data:
                for ids in batch["input_ids"]:  # PEFT's hook takes one row at a time
                    model(input_ids=ids[None], use_cache=False)

    preprocess_corda(model, cfg, run_model=run)
    return peft.get_peft_model(model, cfg)


def lora_ga(model: Any, r: int, data: list) -> object:
    import peft
    from peft.tuners.lora.loraga import preprocess_loraga

    cfg = config(r, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    model.requires_grad_(True)

    def step() -> None:
        for batch in data:
            model(**batch, use_cache=False).loss.backward()

    preprocess_loraga(model, cfg, step)
    return peft.get_peft_model(model, cfg)


PAIRS: dict[str, tuple[str, dict[str, Any], Callable[[Any, int, list], object]]] = {
    "lora": ("lora", {}, plain()),
    "dora": ("dora", {}, plain(use_dora=True)),
    "pissa": ("pissa", {}, plain(init_lora_weights="pissa")),
    "pissa randomised": ("pissa", {"svd": "randomised", "niter": 4}, plain(init_lora_weights="pissa_niter_4")),
    "olora": ("olora", {}, plain(init_lora_weights="olora")),
    "eva": ("eva", {"rho": 1.0}, eva),
    "corda": ("corda", {"mode": "ipm"}, corda),
    "lora_ga": ("lora_ga", {}, lora_ga),
}


def ours(method: str, model: Any, r: int, data: list) -> object:
    name, fields, _ = PAIRS[method]
    variant = ll.get_variant(name)
    cfg = variant.config(variant=name, r=r, alpha=2 * r, **fields)
    return ll.attach(model, cfg, calibration_data=data if variant.needs_data else None)


def seconds(attach: Callable[[Any], object], base: Any) -> float:
    model = copy.deepcopy(base)
    start = time.process_time()
    attach(model)
    return time.process_time() - start


def measure(method: str, base: Any, size: str, r: int, rounds: int, data: list) -> dict[str, Any]:
    """One row."""
    times: dict[str, list[float]] = {"peft": [], "ours": []}
    rounds = min(rounds, SLOW.get(method, rounds))
    for i in range(rounds + (method not in SLOW)):
        for who, attach in (
            ("peft", lambda m: PAIRS[method][2](m, r, data)),
            ("ours", lambda m: ours(method, m, r, data)),
        ):
            took = seconds(attach, base)
            if i or method in SLOW:  # the first round warms up
                times[who].append(took)
    ratio = speed.paired(times["ours"], times["peft"])
    row = {"method": method, "size": size, "r": r, "rounds": rounds, "ours_vs_peft": ratio}
    if method in GOALS:
        row |= {"goal": GOALS[method], "missed": ratio["q1"] > GOALS[method]}
    return row


def table(data: dict) -> str:
    lines = [
        "# What attaching costs against PEFT",
        "",
        f"S4 (hidden 384, 4 layers) and M3 (768, 3), all linear layers, one CPU thread; data: {data['batches']} "
        "batches of 4 x 128 tokens. Medians of paired ratios lora-lite / PEFT [quartiles]; below 1 is faster. "
        "PEFT's start from data is the call its documentation names. Generated by `benchmarks/attach.py`.",
        "",
        "| method | size | r | rounds | lora-lite / PEFT | goal |",
        "|---|---|---|---|---|---|",
    ]
    for r in data["rows"]:
        c = r["ours_vs_peft"]
        goal = f"{r['goal']} {'missed' if r['missed'] else 'met'}" if "goal" in r else "-"
        lines.append(
            f"| {r['method']} | {r['size']} | {r['r']} | {r['rounds']} | {c['median']:.2f} [{c['q1']:.2f}, "
            f"{c['q3']:.2f}] | {goal} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--sizes", nargs="+", choices=list(speed.SIZES), default=["S4", "M3"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, default=Path("runs/attach.json"))
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    import peft

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "lora_lite": ll.__version__,
    }
    data: dict = {
        "batches": args.batches,
        "threads": 1,
        "processor": platform.machine(),
        "versions": versions,
        "rows": [],
    }
    calibration = batches(args.batches)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    for size in args.sizes:
        base = speed.base(size)
        for method in args.methods:
            data["rows"].append(measure(method, base, size, args.rank, args.rounds, calibration))
            print(json.dumps(data["rows"][-1]), flush=True)
            args.json.write_text(json.dumps(data, indent=1) + "\n")
    if args.table:
        args.table.write_text(table(data))


if __name__ == "__main__":
    main()
