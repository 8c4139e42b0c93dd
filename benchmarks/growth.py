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


def picture(data: dict, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    titles = {"layers": "blocks (two targets each)", "r": "rank", "adapters": "attached adapters"}
    for by, rows in data["sweeps"].items():
        fig, axes = plt.subplots(1, len(SHOWN), figsize=(3.2 * len(SHOWN), 2.9))
        for ax, what in zip(axes, SHOWN, strict=True):
            xs, ys = [r[by] for r in rows], [r[what] for r in rows]
            ax.plot(xs, ys, "o-", ms=3)
            ax.set(
                xscale="log",
                yscale="log",
                xlabel=titles[by],
                title=f"{what.replace('_', ' ')}  ~ n^{exponent(rows, by, what):.2f}",
            )
        fig.tight_layout()
        fig.savefig(folder / f"growth_{by}.png", dpi=90)
        plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("runs/growth.json"))
    parser.add_argument("--plots", type=Path)
    args = parser.parse_args()
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
    if args.plots:
        picture(data, args.plots)


if __name__ == "__main__":
    main()
