"""Many adapters of one model: attaching and loading a thousand, switching, memory, mixed batches, and a store that
serves thousands.

The model is 32 blocks of two linear layers. One thread; process time where a call is timed, wall time where threads
wait for files.

    python benchmarks/many.py --json benchmarks/results/many.json
    python benchmarks/many.py --json benchmarks/results/many.json --table docs/results/many.md
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from growth import Stack

import lora_lite as ll


def cfg(r: int) -> ll.LoRAConfig:
    return ll.LoRAConfig(r=r, alpha=2 * r)


def resident_bytes() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


def bare_over_tensors(n: int, blocks: int, d: int, r: int) -> float:
    """What torch needs for as many parameters of the same shapes and nothing else, as a multiple of their bytes."""
    layers = [layer for layer in Stack(blocks, d).modules() if isinstance(layer, torch.nn.Linear)]
    gc.collect()
    before, own = resident_bytes(), 0
    for i in range(n):
        for layer in layers:
            for name, shape in (("A", (r, layer.in_features)), ("B", (layer.out_features, r))):
                parameter = torch.nn.Parameter(torch.empty(shape).fill_(i))
                layer.register_parameter(f"{name}_{i}", parameter)
                own += parameter.nbytes
    return (resident_bytes() - before) / own


def quantiles(times: list[float]) -> dict[str, float]:
    """Milliseconds."""
    cut = statistics.quantiles(times, n=100)
    return {"median_ms": round(1e3 * cut[49], 3), "p99_ms": round(1e3 * cut[98], 3)}


def attach_many(n: int, blocks: int, d: int, r: int) -> tuple[torch.nn.Module, dict]:
    """n adapters: seconds in all, of the first and the last hundred, and memory beside the tensors' own."""
    model = Stack(blocks, d)
    ll.attach(model, cfg(r), name="first")
    ll.detach(model, "first")
    gc.collect()
    before, times = resident_bytes(), []
    for i in range(n):
        start = time.process_time()
        ll.attach(model, cfg(r), name=f"a{i}")
        times.append(time.process_time() - start)
    gc.collect()
    grown = resident_bytes() - before
    own = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
    some = max(1, n // 10)
    return model, {
        "adapters": n,
        "targets_each": 2 * blocks,
        "width": d,
        "r": r,
        "attach_s": round(sum(times), 2),
        "first_ms": round(1e3 * statistics.median(times[:some]), 2),
        "last_ms": round(1e3 * statistics.median(times[-some:]), 2),
        "tensors_mb": round(own / 1e6, 1),
        "memory_over_tensors": round(grown / own, 4),
    }


def switching(model: torch.nn.Module, n: int) -> dict:
    names, times = [f"a{i}" for i in range(n)], []
    for i in range(2000):
        start = time.perf_counter()
        ll.activate(model, names[i * 7 % n])
        times.append(time.perf_counter() - start)
    return quantiles(times)


@torch.no_grad()
def mixed(model: torch.nn.Module, n: int, rows: int, rounds: int = 30) -> dict:
    """One mixed batch per block, its adapters out of 16 and out of all n resident ones, in turn."""
    x, pools = torch.randn(rows, 16, model.layers[0]["up_proj"].in_features), {"16": 16, "all": n}
    draw, times = random.Random(0), {pool: [] for pool in pools}
    for i in range(rounds + 2):
        for pool, size in pools.items():
            names = (
                [f"a{draw.randrange(size)}" for _ in range(rows)] if size > 16 else [f"a{k % 16}" for k in range(rows)]
            )
            if size > 16:  # as many different ones in both, so that only the number of residents differs
                chosen = draw.sample(range(size), 16)
                names = [f"a{chosen[k % 16]}" for k in range(rows)]
            start = time.process_time()
            with ll.rows(model, names):
                model(x)
            if i > 1:
                times[pool].append(time.process_time() - start)
    ratio = statistics.median(b / a for a, b in zip(times["16"], times["all"], strict=True))
    return {
        "rows": rows,
        "out_of_16_ms": round(1e3 * statistics.median(times["16"]), 2),
        f"out_of_{n}_ms": round(1e3 * statistics.median(times["all"]), 2),
        "ratio": round(ratio, 3),
    }


def load_many(folder: Path, n: int, blocks: int, d: int) -> dict:
    model, times = Stack(blocks, d), []
    for i in range(n):
        start = time.process_time()
        ll.load(model, folder / f"a{i}.safetensors", name=f"a{i}", base_check="ignore")
        times.append(time.process_time() - start)
    some = max(1, n // 10)
    return {
        "files": n,
        "load_s": round(sum(times), 2),
        "first_ms": round(1e3 * statistics.median(times[:some]), 2),
        "last_ms": round(1e3 * statistics.median(times[-some:]), 2),
    }


@torch.no_grad()
def served(files: list[Path], n: int, resident: int, alpha: float, requests: int, blocks: int, d: int) -> dict:
    """S-LoRA's workload (Sheng et al. 2023, arXiv 2311.03285): request i asks for adapter k with P ∝ k^−α. One request
    per batch, one forward of 16 tokens; latency from asking to the answer. Adapters beyond the files are links."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for k in range(n):
            (folder / f"a{k}.safetensors").symlink_to(files[k % len(files)])
        model = Stack(blocks, d)
        store = ll.AdapterStore(model, folder, resident=resident, base_check="ignore")
        weights = [(k + 1) ** -alpha for k in range(n)]
        asked = random.Random(0).choices(range(n), weights, k=requests + 1)
        x, times = torch.randn(1, 16, d), []
        for now, then in zip(asked, asked[1:], strict=False):
            start = time.perf_counter()
            with store.active(f"a{now}"):
                store.prefetch([f"a{then}"])  # a queue knows who is next
                model(x)
            times.append(time.perf_counter() - start)
        row = {"adapters": n, "resident": resident, "alpha": alpha, "requests": requests}
        row |= {"hit_rate": round(store.hits / (store.hits + store.misses), 3), **quantiles(times)}
        store.close()
    return row


def table(data: dict) -> str:
    """The committed page."""
    a, load, s = data["attach"], data["load"], data["switch"]
    facts = [
        ("attach", f"{a['attach_s']:.0f} s in all; the first hundred {a['first_ms']:.0f} ms each, the last "
         f"{a['last_ms']:.0f}"),
        ("load from files", f"{load['load_s']:.0f} s in all; the first hundred {load['first_ms']:.0f} ms each, the "
         f"last {load['last_ms']:.0f}"),
        ("switch", f"{s['median_ms']:.3f} ms; 99 % within {s['p99_ms']:.3f} ms"),
        ("memory", f"{a['memory_over_tensors']:.3f} of the tensors' own bytes; bare parameters of these shapes need "
         f"{a['bare_parameters_over_tensors']:.3f}"),
        *((f"a batch of {row['rows']} rows", f"{row['ratio']:.2f} of the time with 16 resident adapters")
          for row in data["mixed"]),
    ]  # fmt: skip
    lines = [
        "# Thousands of adapters",
        "",
        f"{a['adapters']:,} LoRAs (r = {a['r']}) on {a['targets_each']} linear layers {a['width']} wide, one thread of "
        "the processor. Generated by `benchmarks/many.py`.",
        "",
        "| | measured |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts),
        "",
        "`ll.AdapterStore`: one request a batch, a forward of 16 tokens; adapter k is asked for with probability "
        "k^-α (S-LoRA's workload, arXiv 2311.03285), and the next one is known. Latency is from asking to the answer.",
        "",
        "| adapters in the folder | resident | α | found in memory | latency, median | 99 % within |",
        "|---|---|---|---|---|---|",
    ]
    for r in data["store"]:
        lines.append(
            f"| {r['adapters']:,} | {r['resident']} | {r['alpha']} | {r['hit_rate']:.0%} | {r['median_ms']:.0f} ms | "
            f"{r['p99_ms']:.0f} ms |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("runs/many.json"))
    parser.add_argument("--table", type=Path, help="write the figures of --json as a page; measure nothing")
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--served", type=int, nargs="*", default=[1000, 10000])
    parser.add_argument("--requests", type=int, default=500)
    args = parser.parse_args()
    if args.table:
        args.table.write_text(table(json.loads(args.json.read_text())))
        return
    torch.set_num_threads(1)
    n, blocks, d = args.adapters, args.blocks, args.width
    machine = {"python": platform.python_version(), "torch": torch.__version__, "threads": 1, "cpu": platform.machine()}
    data: dict = {"machine": machine}

    def keep(key: str, value: object) -> None:
        data[key] = value
        print(key, value, flush=True)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(data, indent=1) + "\n")

    with ProcessPoolExecutor(1) as beside:  # in this process, memory that was freed would be found again
        bare = beside.submit(bare_over_tensors, n, blocks, d, args.rank).result()
    model, row = attach_many(n, blocks, d, args.rank)
    row["bare_parameters_over_tensors"] = round(bare, 4)
    row["memory_over_bare"] = round(row["memory_over_tensors"] / bare, 4)
    keep("attach", row)
    keep("switch", switching(model, n))
    keep("mixed", [mixed(model, n, rows) for rows in (16, 64)])
    with tempfile.TemporaryDirectory() as place:
        some = min(n, 100)
        files = [ll.save(model, Path(place) / f"a{i}.safetensors", f"a{i}") for i in range(some)]
        for i in range(some, n):
            (Path(place) / f"a{i}.safetensors").symlink_to(files[i % some])
        del model
        gc.collect()
        keep("load", load_many(Path(place), n, blocks, d))
        gc.collect()
        settings = [(k, alpha) for k in args.served for alpha in (0.6, 1.0)]
        keep("store", [served(files, k, 64, alpha, args.requests, blocks, d) for k, alpha in settings])


if __name__ == "__main__":
    main()
