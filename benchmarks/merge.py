"""Seconds that merging and unmerging one layer of an 8-billion-parameter Llama takes, against PEFT.

Linear layers of 4096 -> 4096 (twice), 4096 -> 1024 (twice), 4096 -> 14336 (twice) and 14336 -> 4096. Interleaved in one
process (PEFT, ours, repeat); process time, one thread unless said; medians of the rounds and of the paired ratios. Both
sides merge adapters with random tensors into weights of their own.

    python benchmarks/merge.py --json benchmarks/results/merge.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_lite as ll
from lora_lite.bench import speed
from lora_lite.testing.case import randomise

WIDTHS = {
    "q_proj": (4096, 4096),
    "k_proj": (4096, 1024),
    "v_proj": (4096, 1024),
    "o_proj": (4096, 4096),
    "gate_proj": (4096, 14336),
    "up_proj": (4096, 14336),
    "down_proj": (14336, 4096),
}
# method -> PEFT's config class and arguments, at our default size
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 8}),
    "dora": ("LoraConfig", {"r": 8, "use_dora": True}),
    "loha": ("LoHaConfig", {"r": 8}),
    "lokr": ("LoKrConfig", {"r": 8}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "road": ("RoadConfig", {"variant": "road_1"}),
    "oft": ("OFTConfig", {"oft_block_size": 32, "use_cayley_neumann": False}),
    "miss": ("MissConfig", {"r": 8}),
    "delora": ("DeloraConfig", {"r": 8}),
    "gralora": ("GraloraConfig", {"r": 8, "gralora_k": 2}),
    "c3a": ("C3AConfig", {"block_size": 256}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 1000}),
    "waveft": ("WaveFTConfig", {"n_frequency": 2592}),
    "shira": ("ShiraConfig", {"r": 8}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "hra": ("HRAConfig", {"r": 8}),
}
SLOW = ("boft", "hra", "waveft", "fourierft", "c3a")
"""Measured in one round, because PEFT takes minutes."""


def layer(dtype: torch.dtype, scale: int) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    model = nn.Module()
    for name, (d_in, d_out) in WIDTHS.items():
        linear = nn.Linear(d_in // scale, d_out // scale, bias=False, device="meta", dtype=dtype).to_empty(device="cpu")
        with torch.no_grad():
            linear.weight.uniform_(-(d_in**-0.5), d_in**-0.5, generator=g)
        setattr(model, name, linear.requires_grad_(False))
    model.forward = lambda x: x
    return model


def timed(f: Callable[[], object]) -> float:
    start = time.process_time()
    f()
    return time.process_time() - start


def ours(method: str, dtype: torch.dtype, scale: int) -> nn.Module:
    model = layer(dtype, scale)
    variant = ll.get_variant(method)
    ll.attach(model, variant.config(variant=method))
    randomise(model, scale=0.02)
    return model


def theirs(method: str, dtype: torch.dtype, scale: int) -> Any:
    if method not in PEFT or not speed.has_peft():
        return None
    import peft

    name, arguments = PEFT[method]
    model = peft.inject_adapter_in_model(
        getattr(peft, name)(target_modules=list(WIDTHS), **arguments), layer(dtype, scale)
    )
    for module in layers_of(model):  # not at the identity, where some do nothing
        for key, p in module.named_parameters():
            if p.requires_grad and "base_layer" not in key:
                p.data.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p))
    return model


def layers_of(model: Any) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "merge") and hasattr(m, "base_layer")]


def measure(method: str, dtype: torch.dtype, rounds: int, scale: int) -> dict[str, Any]:
    mine, other = ours(method, dtype, scale), theirs(method, dtype, scale)
    times: dict[str, list[float]] = {k: [] for k in ("merge", "unmerge", "peft_merge", "peft_unmerge")}
    for _ in range(rounds):
        if other is not None:
            with torch.no_grad():
                times["peft_merge"].append(timed(lambda: [m.merge() for m in layers_of(other)]))
                times["peft_unmerge"].append(timed(lambda: [m.unmerge() for m in layers_of(other)]))
        times["merge"].append(timed(lambda: ll.merge(mine)))
        times["unmerge"].append(timed(lambda: ll.unmerge(mine)))
    row: dict[str, Any] = {"method": method, "dtype": str(dtype).removeprefix("torch."), "rounds": rounds}
    row |= {f"{k}_s": round(statistics.median(v), 3) for k, v in times.items() if v}
    for what in ("merge", "unmerge"):
        if times[f"peft_{what}"]:
            ratios = [a / b for a, b in zip(times[what], times[f"peft_{what}"], strict=True)]
            row[f"{what}_vs_peft"] = round(statistics.median(ratios), 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(PEFT))
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scale", type=int, default=1, help="divide every width by this, for a trial")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data: dict[str, Any] = {"rows": []}
    if args.json is not None and args.json.exists():
        data = json.loads(args.json.read_text())
    for method in args.methods:
        for dtype in args.dtypes:
            rounds = 1 if method in SLOW else args.rounds
            row = measure(method, getattr(torch, dtype), rounds, args.scale) | {"threads": args.threads}
            print(row, flush=True)
            key = ("method", "dtype", "threads")
            data["rows"] = [r for r in data["rows"] if any(r[k] != row[k] for k in key)] + [row]
            if args.json is not None:
                data |= speed.machine()
                args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
