"""The leaderboard's pictures: what accuracy costs, and how much it hangs on the rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lora_lite as ll

from .board import Row, Standing

COLOURS = 20


def pareto(standings: Sequence[Standing], key: str, label: str) -> Any:
    """Accuracy against a cost; the methods that no other one beats in both are joined."""
    figure, axes = _figure()
    points = []
    for s in standings:
        cost = s.forgotten if key == "forgotten" else s.average(key)
        if cost is not None and s.mean is not None:
            points.append((cost, 100 * s.mean, 100 * (s.half or 0.0), s.entry.label))
    for cost, mean, half, _ in points:
        axes.errorbar(cost, mean, yerr=half, fmt="o", ms=4, lw=1, color="tab:blue")
    front, best = [], -1.0
    for cost, mean, _, name in sorted(points, key=lambda p: (p[0], -p[1])):
        if mean > best:
            front.append((cost, mean, name))
            best = mean
    axes.step([f[0] for f in front], [f[1] for f in front], where="post", color="tab:orange", lw=1.2, zorder=0)
    beaten = {p[3] for p in points} - {f[2] for f in front}
    for cost, mean, _, name in points:
        style = {"fontsize": 7, "color": "#888" if name in beaten else "black"}
        axes.annotate(name, (cost, mean), xytext=(4, 3), textcoords="offset points", **style)
    if points and min(p[0] for p in points) > 0 and max(p[0] for p in points) > 8 * min(p[0] for p in points):
        axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("right, %")
    return figure


def sensitivity(standings: Sequence[Standing]) -> Any:
    """Right validation answers over the rate as a multiple of the recommended one, a line per method."""
    figure, axes = _figure()
    for i, s in enumerate(standings):
        recommended = ll.get_variant(s.entry.method).lr
        points = sorted((lr / recommended, 100 * share) for lr, share in s.rates.items())
        style = "-" if i < COLOURS // 2 else "--"
        axes.plot(*zip(*points, strict=True), style, marker="o", ms=3, lw=1.2, label=s.entry.label)
    axes.set_xscale("log")
    factors = sorted({round(lr / ll.get_variant(s.entry.method).lr, 2) for s in standings for lr in s.rates})
    axes.set_xticks(factors, [f"{f:g}" for f in factors])
    axes.minorticks_off()
    axes.set_xlabel("rate / recommended rate")
    axes.set_ylabel("right in validation, %")
    _legend(axes, len(standings))
    return figure


def curves(standings: Sequence[Standing], rows: Sequence[Row]) -> Any:
    """Training loss of the chosen rate (the lowest seed that has run), a line per method."""
    figure, axes = _figure()
    for i, s in enumerate(standings):
        best = s.chosen if s.chosen is not None else max(s.rates, key=lambda lr: s.rates[lr])
        own = [r for r in rows if r["method"] == s.entry.method and r["lr"] == best and r["fields"] == s.entry.fields]
        row = min(own, key=lambda r: r["seed"])
        losses = [loss for loss in row["losses"] if loss is not None]
        steps = [row["steps"] * (k + 0.5) / len(losses) for k in range(len(losses))]
        axes.plot(steps, losses, "-" if i < COLOURS // 2 else "--", lw=1.1, label=s.entry.label)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    _legend(axes, len(standings))
    return figure


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    return figure, axes


def _legend(axes: Any, n: int) -> None:
    """Beside the picture, so that it hides no line."""
    if n:
        axes.legend(frameon=False, fontsize=7, ncols=1 + n // 26, loc="center left", bbox_to_anchor=(1.0, 0.5))
