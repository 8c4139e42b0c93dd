"""The leaderboard's pictures: what accuracy costs, and how much it hangs on the rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lora_lite as ll

from .board import Row, Standing

COLOURS = 20
Point = tuple[float, float, float, str]
"""Cost, share of right answers and half its interval in %, label."""


def pareto(standings: Sequence[Standing], key: str, label: str) -> Any:
    """Accuracy against a cost; the methods that no other one beats in both are joined."""
    figure, axes = _figure()
    points = [point for s in standings if (point := _point(s, key)) is not None]
    front = _front(points)
    axes.step([p[0] for p in front], [p[1] for p in front], where="post", color="tab:orange", lw=1.2, zorder=0)
    for point in points:
        cost, mean, half, name = point
        axes.errorbar(cost, mean, yerr=half, fmt="o", ms=4, lw=1, color="tab:blue")
        colour = "black" if point in front else "#888"
        axes.annotate(name, (cost, mean), xytext=(4, 3), textcoords="offset points", fontsize=7, color=colour)
    costs = [p[0] for p in points]
    if costs and 0 < 8 * min(costs) < max(costs):
        axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("right, %")
    return figure


def _point(s: Standing, key: str) -> Point | None:
    """Where an entry lies, if it has both figures."""
    cost = s.forgotten if key == "forgotten" else s.average(key)
    return None if cost is None or s.mean is None else (cost, 100 * s.mean, 100 * (s.half or 0.0), s.entry.label)


def _front(points: Sequence[Point]) -> list[Point]:
    """Those that are better than all cheaper ones, the cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front


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
