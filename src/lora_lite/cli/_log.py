"""The record of a run: one JSON line per step, and a picture of train and eval loss. Both are written while it runs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REDRAW = 30.0
"""Seconds between two pictures while training."""


class RunLog:
    """Appends to `log.jsonl` and draws `loss.png` in a folder. `keep` drops the lines after a step, for a run that goes
    on from there."""

    def __init__(self, folder: Path, title: str) -> None:
        self.path, self.picture, self.title = folder / "log.jsonl", folder / "loss.png", title
        self.rows: list[dict[str, Any]] = []
        self.drawn = time.monotonic()
        self.before = 0.0
        """Seconds that earlier parts of the run took."""
        self.start = time.monotonic()

    def keep(self, step: int) -> None:
        """Go on after `step`: read the lines up to it, drop later ones."""
        if self.path.is_file() and step:
            self.rows = [r for r in _whole_lines(self.path.read_text()) if r["step"] <= step]
        self.before = self.rows[-1]["time"] if self.rows else 0.0
        self.path.write_text("".join(json.dumps(r) + "\n" for r in self.rows))

    def add(self, step: int, **values: float) -> None:
        """One line: the step, seconds since the start, and what was measured."""
        row = {"step": step, "time": round(self.before + time.monotonic() - self.start, 3), **values}
        self.rows.append(row)
        with self.path.open("a") as f:
            f.write(json.dumps(row) + "\n")
        if "eval_loss" in values or time.monotonic() - self.drawn > REDRAW:
            self.draw()

    def draw(self) -> None:
        """Write the picture beside its place, then rename it: a viewer never finds half of one."""
        train = [(r["step"], r["loss"]) for r in self.rows if "loss" in r]
        evals = [(r["step"], r["eval_loss"]) for r in self.rows if "eval_loss" in r]
        if train or evals:
            beside = self.picture.with_name("loss.tmp.png")
            draw_loss(beside, train, evals, self.title)
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


def draw_loss(path: Path, train: Sequence[tuple[int, float]], evals: Sequence[tuple[int, float]], title: str) -> None:
    """Train loss per step (faint) and its running mean, eval loss as points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
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
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)


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
