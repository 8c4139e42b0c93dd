"""What the hooks themselves cost: µs per call of a tiny layer, against the bare nn.Linear.

The layer is 8x8 with one token, so the time is dispatch, not arithmetic. Rounds interleave all cases; medians and
quartiles of the paired differences. `python benchmarks/hook_dispatch.py [--json FILE]`
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import lora_lite as ll


class Echo(ll.Variant):
    """A page that computes nothing, so that only the dispatch remains."""

    name = "dispatch_probe"

    @staticmethod
    def param_specs(d_in, d_out, cfg):
        return {"lora_A": ll.ParamSpec((1, d_in)), "lora_B": ll.ParamSpec((d_out, 1))}

    @staticmethod
    def forward(layer, x, y):
        _ = layer.lora_A, layer.lora_B
        return y


def layer_with(n: int, variant: str, active: int) -> nn.Module:
    """A container with one 8x8 layer that has n adapters, the first `active` of them acting."""
    model = nn.Sequential(nn.Linear(8, 8))
    for i in range(n):
        ll.attach(model, ll.AdapterConfig(variant=variant, r=1), name=f"a{i}")
    if n:
        ll.activate(model, [f"a{i}" for i in range(active)])
    return model[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--calls", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ll.register(Echo)
    cases = {"bare nn.Linear": layer_with(0, "lora", 0), "attached, none active": layer_with(1, Echo.name, 0)}
    cases |= {f"{n} attached, 1 active": layer_with(n, Echo.name, 1) for n in (1, 4, 16)}
    cases |= {f"{n} attached, {n} active": layer_with(n, Echo.name, n) for n in (4, 16)}
    cases["lora, 1 active"] = layer_with(1, "lora", 1)
    x = torch.randn(1, 8)
    times: dict[str, list[float]] = {name: [] for name in cases}
    with torch.no_grad():
        for _ in range(args.rounds):
            for name, layer in cases.items():
                start = time.process_time()
                for _ in range(args.calls):
                    layer(x)
                times[name].append((time.process_time() - start) / args.calls * 1e6)
    bare = times["bare nn.Linear"]
    rows = []
    for name, ts in times.items():
        extra = [t - b for t, b in zip(ts, bare, strict=True)]
        q1, q2, q3 = statistics.quantiles(extra, n=4)
        rows.append(
            {
                "case": name,
                "us": round(statistics.median(ts), 2),
                "extra_us": round(q2, 2),
                "quartiles": [round(q1, 2), round(q3, 2)],
            }
        )
        print(f"{name:28} {rows[-1]['us']:8.2f} µs   extra {q2:7.2f} µs  [{q1:.2f}, {q3:.2f}]")
    if args.json:
        machine = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpu": platform.processor() or platform.machine(),
            "threads": 1,
        }
        args.json.write_text(
            json.dumps({"machine": machine, "rounds": args.rounds, "calls": args.calls, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
