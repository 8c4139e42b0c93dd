"""How cost grows: attach, step, save and file size against layers, rank and the number of attached adapters; a picture
each.

python benchmarks/growth.py --json benchmarks/results/growth.json --plots docs/results
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import lora_lite as ll


class Stack(nn.Module):
    """`n` residual blocks of two linear layers, width d."""

    def __init__(self, n: int, d: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up_proj": nn.Linear(d, 2 * d), "down_proj": nn.Linear(2 * d, d)}) for _ in range(n)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            x = x + block["down_proj"](block["up_proj"](x).relu())
        return x


def timed(run, repeat: int = 5) -> float:
    times = []
    for _ in range(repeat):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1000 * statistics.median(times)


def measure(layers: int, r: int, adapters: int) -> dict[str, float]:
    """Milliseconds and bytes of one setting; attach is that of the last adapter."""
    torch.manual_seed(0)
    model, x = Stack(layers), torch.randn(8, 64)
    for i in range(adapters - 1):
        ll.attach(model, ll.LoRAConfig(r=r), name=f"a{i}")
    row = {"layers": layers, "targets": 2 * layers, "r": r, "adapters": adapters}

    def attach() -> None:
        ll.attach(model, ll.LoRAConfig(r=r), name="last")

    times = []
    for _ in range(3):
        start = time.process_time()
        attach()
        times.append(time.process_time() - start)
        ll.detach(model, "last")
    row["attach_ms"] = 1000 * statistics.median(times)
    attach()
    opt = torch.optim.AdamW(ll.adapters(model)["last"].parameters())

    def step() -> None:
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()

    step()
    row["step_ms"] = timed(step)
    row["switch_ms"] = timed(lambda: ll.activate(model, "last"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        row["save_ms"] = timed(lambda: ll.save(model, path, "last"), 3)
        row["file_kb"] = path.stat().st_size / 1024
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


SWEEPS = {
    "layers": [{"layers": n, "r": 8, "adapters": 1} for n in (2, 4, 8, 16, 32, 64)],
    "r": [{"layers": 8, "r": r, "adapters": 1} for r in (1, 4, 16, 32, 64)],
    "adapters": [{"layers": 4, "r": 4, "adapters": k} for k in (1, 4, 16, 64, 256, 1000)],
}
SHOWN = ("attach_ms", "step_ms", "save_ms", "file_kb", "switch_ms")


def exponent(rows: list[dict], by: str, what: str) -> float:
    """Slope in log-log between the two largest settings: 0 does not grow, 1 grows in proportion."""
    a, b = rows[-2], rows[-1]
    return math.log(max(b[what], 1e-9) / max(a[what], 1e-9)) / math.log(b[by] / a[by])


TITLES = {
    "attach_ms": "attach, ms",
    "step_ms": "training step, ms",
    "save_ms": "save, ms",
    "file_kb": "file, KB",
    "switch_ms": "switch, ms",
}
SWEPT = {"layers": "blocks (two targets each)", "r": "rank", "adapters": "attached adapters"}


def picture(data: dict, folder: Path) -> None:
    """A picture per sweep. Every axis spans at least two decades, so that noise is not magnified to a trend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    folder.mkdir(parents=True, exist_ok=True)
    for by, rows in data["sweeps"].items():
        figure = Figure(figsize=(2.6 * len(SHOWN), 2.9), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        for axes, what in zip(figure.subplots(1, len(SHOWN)), SHOWN, strict=True):
            xs, ys = [r[by] for r in rows], [r[what] for r in rows]
            axes.plot(xs, ys, "o-", ms=3)
            axes.set(xscale="log", yscale="log", xlabel=SWEPT[by])
            axes.set_title(f"{TITLES[what]}\ngrows as n^{exponent(rows, by, what):.1f}", fontsize=10)
            middle = math.sqrt(min(ys) * max(ys))
            axes.set_ylim(min(0.8 * min(ys), middle / 10), max(1.25 * max(ys), middle * 10))
            axes.set_xticks(xs[:: 1 + (len(xs) > 5)], [f"{x:g}" for x in xs[:: 1 + (len(xs) > 5)]], fontsize=8)
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.25)
        figure.savefig(folder / f"growth_{by}.png")


def markdown(data: dict) -> str:
    """The page that shows the pictures, with the figures beneath."""
    m = data["machine"]
    lines = [
        "# How cost grows",
        "",
        "LoRA on a stack of small residual blocks, 64 wide, one thread: what attaching, a training step, saving, the "
        "file and switching between adapters cost against the number of blocks, the rank, and the number of attached "
        f"adapters. Torch {m['torch']}, {m['cpu']}. Generated by `benchmarks/growth.py`.",
    ]
    for by, rows in data["sweeps"].items():
        lines += ["", f"## By {SWEPT[by]}", "", f"![Costs by {SWEPT[by]}](growth_{by}.png)", ""]
        lines += [f"| {SWEPT[by]} | " + " | ".join(TITLES[what] for what in SHOWN) + " |"]
        lines += ["|" + " --- |" * (1 + len(SHOWN))]
        lines += [f"| {row[by]} | " + " | ".join(f"{row[what]:g}" for what in SHOWN) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("runs/growth.json"))
    parser.add_argument("--plots", type=Path, help="folder of the pictures and their page, growth.md")
    parser.add_argument("--redraw", action="store_true", help="from the figures that stand in --json")
    args = parser.parse_args()
    if args.redraw:
        show(json.loads(args.json.read_text()), args.plots)
        return
    torch.set_num_threads(1)
    machine = {"python": platform.python_version(), "torch": torch.__version__, "threads": 1, "cpu": platform.machine()}
    data: dict = {"machine": machine, "sweeps": {}}
    for by, settings in SWEEPS.items():
        data["sweeps"][by] = rows = []
        for setting in settings:
            rows.append(measure(**setting))
            print(rows[-1], flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(data, indent=1) + "\n")
    show(data, args.plots)


def show(data: dict, folder: Path | None) -> None:
    if folder is not None:
        picture(data, folder)
        (folder / "growth.md").write_text(markdown(data))


if __name__ == "__main__":
    main()
