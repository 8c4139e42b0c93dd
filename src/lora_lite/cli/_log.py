"""The record of a run: one JSON line per step, and a picture of train and eval loss. Both are written while it runs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOG = "log.jsonl"
NAMED = 6
"""Blocks that the picture names one by one; of more, the first and the last."""
REDRAW = 30.0
"""Seconds between two pictures while training."""


class RunLog:
    """Appends to `log.jsonl` and draws `loss.png` in a folder. `keep` drops the lines after a step, for a run that goes
    on from there."""

    def __init__(self, folder: Path, title: str) -> None:
        self.path, self.picture, self.title = folder / LOG, folder / "loss.png", title
        self.rows: list[dict[str, Any]] = []
        self.drawn = time.monotonic()
        self.speaks = True
        """Only the first process writes."""
        self.before = 0.0
        """Seconds that earlier parts of the run took."""
        self.start = time.monotonic()

    def keep(self, step: int) -> None:
        """Go on after `step`: read the lines up to it, drop later ones."""
        if self.path.is_file() and step:
            self.rows = [r for r in _whole_lines(self.path.read_text(errors="replace")) if r["step"] <= step]
        self.before = self.rows[-1]["time"] if self.rows else 0.0
        if self.speaks:
            self.path.write_text("".join(json.dumps(r) + "\n" for r in self.rows))

    def add(self, step: int, **values: Any) -> None:
        """One line: the step, seconds since the start, and what was measured."""
        row = {"step": step, "time": round(self.before + time.monotonic() - self.start, 3), **values}
        self.rows.append(row)
        if self.speaks:
            with self.path.open("a") as f:
                f.write(json.dumps(row) + "\n")
        if "eval_loss" in values or time.monotonic() - self.drawn > REDRAW:
            self.draw()

    def draw(self) -> None:
        """Write the picture beside its place, then rename it: a viewer never finds half of one."""
        if self.speaks and any("loss" in r or "eval_loss" in r for r in self.rows):
            beside = self.picture.with_name("loss.tmp.png")
            draw_run(beside, self.rows, self.title)
            beside.replace(self.picture)
        self.drawn = time.monotonic()


def _whole_lines(text: str) -> list[dict[str, Any]]:
    """The lines of a log; the last one may be cut short by a full disk or a lost machine."""
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row and "time" in row:
            rows.append(row)
    return rows


def draw_run(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Train and eval loss; the norm of the gradient; how far each block has moved from its start."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [_losses]
    for key, panel in (("grad_norm", _gradients), ("updates", _updates)):
        shown += [panel] * any(key in row for row in rows)
    figure = Figure(figsize=(6.4, 1.4 + 2.6 * len(shown)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(shown), 1, sharex=True, squeeze=False, height_ratios=[3, 2, 2][: len(shown)])
    for axes, panel in zip(grid[:, 0], shown, strict=True):
        panel(axes, rows)
        axes.grid(alpha=0.25)
        axes.set_ylim(bottom=0 if axes.get_yscale() != "log" and axes.get_ylim()[0] < 0 else None)
    grid[0, 0].set_title(title, fontsize=10)
    grid[-1, 0].set_xlabel("step")
    figure.savefig(path)


def _losses(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Train loss per step (faint) and its running mean, eval loss as points."""
    train = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    evals = [(r["step"], r["eval_loss"]) for r in rows if "eval_loss" in r]
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
        axes.plot(steps, smooth(losses), color="tab:blue", linewidth=1.8, label="train (running mean)")
    if evals:
        axes.plot(*zip(*evals, strict=True), color="tab:orange", marker="o", markersize=4, linewidth=1.8, label="eval")
    values = [v for _, v in (*train, *evals)]
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False)


def _gradients(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Norm of the gradient before clipping."""
    steps, norms = zip(*[(r["step"], r["grad_norm"]) for r in rows if "grad_norm" in r], strict=True)
    axes.plot(steps, norms, color="tab:green", alpha=0.3, linewidth=0.8)
    axes.plot(steps, smooth(norms), color="tab:green", linewidth=1.8)
    axes.set_ylabel("gradient norm")


def _updates(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """A line per block, from the first (dark) to the last (light)."""
    from matplotlib import colormaps

    looked = [r for r in rows if "updates" in r]
    blocks = list(dict.fromkeys(block for r in looked for block in r["updates"]))
    for i, block in enumerate(blocks):
        points = [(r["step"], r["updates"][block]) for r in looked if block in r["updates"]]
        name = block if len(blocks) <= NAMED or i in (0, len(blocks) - 1) else None
        colour = colormaps["viridis"](0.9 * i / max(1, len(blocks) - 1))
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, label=name)
    axes.set_ylabel("norm of the update")
    axes.legend(frameon=False, fontsize=7)


def smooth(values: Sequence[float]) -> list[float]:
    """Running mean over a tenth of the run, centred on each step so that it lags behind nothing; narrower at the
    ends."""
    reach = max(1, len(values) // 20)
    out = []
    for i in range(len(values)):
        here = min(reach, i, len(values) - 1 - i)
        window = values[i - here : i + here + 1]
        out.append(sum(window) / len(window))
    return out
