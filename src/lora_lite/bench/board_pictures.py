"""The leaderboard's pictures: what accuracy costs, and how much it hangs on the rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lora_lite as ll

from .board import Row, Standing

WIDE = 6
"""Panels side by side."""
MANY = 30
"""Points beyond which a picture is drawn larger."""
SMOOTH = 4
"""A smoothed loss is the mean of so many values before, itself, and as many after."""
Point = tuple[float, float, float, str]
"""Cost, share of right answers and half its interval in %, label."""
PLACES = [(4, 3), (4, -9), (-4, 3), (-4, -9), (4, 12), (4, -18), (-4, 12), (-4, -18)]
"""Where a name may stand, in points from its own."""
Line = tuple[list[float], list[float]]
"""x and y."""


def pareto(standings: Sequence[Standing], key: str, label: str) -> Any:
    """Accuracy against a cost; the methods that no other one beats in both are joined."""
    points = [point for s in standings if (point := _point(s, key)) is not None]
    figure, axes = _figure((11.0, 7.5) if len(points) > MANY else (8.0, 5.0))
    front = _front(points)
    axes.step([p[0] for p in front], [p[1] for p in front], where="post", color="tab:orange", lw=1.2, zorder=0)
    for cost, mean, half, _ in points:
        axes.errorbar(cost, mean, yerr=half, lw=1, color="tab:blue", alpha=0.3, zorder=1)
        axes.plot(cost, mean, "o", ms=3.5, color="tab:blue", zorder=2)
    costs = [p[0] for p in points]
    if costs and 0 < 8 * min(costs) < max(costs):
        axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("right, %")
    _name(figure, axes, points, front)
    return figure


def _name(figure: Any, axes: Any, points: Sequence[Point], front: Sequence[Point]) -> None:
    """The names beside the points, each in the first place where it hides no other: the front's first. Of the others,
    one that finds no place is left to the table."""
    figure.canvas.draw()  # from here on, the axes know where a point lies
    taken: list[Any] = []
    for point in [*front, *(p for p in points if p not in front)]:
        cost, mean, _, name = point
        colour = "black" if point in front else "#777"
        for place in PLACES:
            text = axes.annotate(
                name, (cost, mean), place, textcoords="offset points", fontsize=7, color=colour,
                ha="left" if place[0] > 0 else "right",
            )  # fmt: skip
            box = text.get_window_extent()
            last = place == PLACES[-1] and point in front
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1
            if last or (inside and not any(box.overlaps(other) for other in taken)):
                taken.append(box)
                break
            text.remove()


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
    """Right validation answers over the rate as a multiple of the recommended one: a panel for each method of which
    several rates have run, LoRA's line in grey."""

    def line(s: Standing) -> Line:
        recommended = ll.get_variant(s.entry.method).lr
        points = sorted((lr / recommended, 100 * share) for lr, share in s.rates.items())
        return [p[0] for p in points], [p[1] for p in points]

    lines = {s.entry.label: line(s) for s in standings if len(s.rates) > 1}
    figure, panels = _panels(
        lines, "rate / recommended rate", "right in validation, %", _lora(standings), marker="o", ms=2.5
    )
    ticks = _ticks([x for xs, _ in lines.values() for x in xs])
    for axes in panels:
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{f:.0f}" if f > 1 else f"{f:.2g}" for f in ticks])
        axes.minorticks_off()
    return figure


def _lora(standings: Sequence[Standing]) -> str | None:
    """The line of LoRA among them."""
    return next((s.entry.label for s in standings if s.entry.method == "lora"), None)


def _ticks(factors: Sequence[float]) -> list[float]:
    """The factors that differ by more than the rounding of rates; of many every second, with 1 among them."""
    found: list[float] = []
    for factor in sorted(factors):
        if not found or factor > 1.2 * found[-1]:
            found.append(factor)
    one = min(range(len(found)), key=lambda i: abs(found[i] - 1), default=0)
    return found[one % 2 :: 2] if len(found) > 5 else found


def curves(standings: Sequence[Standing], rows: Sequence[Row]) -> Any:
    """Training loss of the chosen rate, or of the best that has run (its lowest seed), smoothed: a panel for each
    method, LoRA's line in grey."""

    def line(s: Standing) -> Line:
        best = s.chosen if s.chosen is not None else max(s.rates, key=lambda lr: s.rates[lr])
        own = [r for r in rows if r["method"] == s.entry.method and r["lr"] == best and r["fields"] == s.entry.fields]
        row = min(own, key=lambda r: r["seed"])
        losses = [loss for loss in row["losses"] if loss is not None]
        near = [losses[max(0, k - SMOOTH) : k + SMOOTH + 1] for k in range(len(losses))]
        steps = [row["steps"] * (k + 0.5) / len(losses) for k in range(len(losses))]
        return steps, [sum(some) / len(some) for some in near]

    figure, panels = _panels({s.entry.label: line(s) for s in standings}, "step", "training loss", _lora(standings))
    for axes in panels:
        axes.set_yscale("log")
    return figure


def sizes(standings: Mapping[int, Sequence[Standing]]) -> Any:
    """Right answers of each method that has more than one of these numbers of trained parameters, with intervals: a
    line for each, the best at its largest size on top."""
    every: dict[str, dict[int, tuple[float, float]]] = {}
    for n, group in sorted(standings.items()):
        for s in group:
            every.setdefault(s.entry.method, {})[n] = 100 * (s.mean or 0.0), 100 * (s.half or 0.0)
    found = {name: sizes for name, sizes in every.items() if len(sizes) > 1}
    names = sorted(found, key=lambda name: max((n, mean) for n, (mean, _) in found[name].items()))
    figure, axes = _figure((8.0, 1.2 + 0.17 * len(names)))
    colour = {n: f"C{i}" for i, n in enumerate(sorted(standings))}
    for place, name in enumerate(names):
        means = [mean for mean, _ in found[name].values()]
        axes.plot([min(means), max(means)], [place, place], color="#ccc", lw=1, zorder=0)
        for n, (mean, half) in found[name].items():
            axes.errorbar(mean, place, xerr=half, fmt="o", ms=3.5, lw=0.7, color=colour[n])
    for n in colour:
        axes.plot([], [], "o", ms=3.5, color=colour[n], label=f"about {n:,} trained")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(-0.8, len(names))
    axes.set_xlim(left=0)
    axes.set_xlabel("right, %")
    axes.legend(loc="lower right", fontsize=8)
    return figure


def _panels(lines: dict[str, Line], across: str, up: str, beside: str | None, **style: Any) -> tuple[Any, list[Any]]:
    """A figure with a small panel for each line, all to one scale, and the line of `beside` in grey."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(WIDE, max(1, len(lines)))
    height = -(-len(lines) // columns)
    figure = Figure(figsize=(max(4.0, 1.5 * columns), 0.7 + 1.25 * max(1, height)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[Any] = []
    for i, (label, (x, y)) in enumerate(lines.items()):
        axes = figure.add_subplot(
            height, columns, i + 1, sharex=panels[0] if i else None, sharey=panels[0] if i else None
        )
        axes.grid(alpha=0.25)
        if beside in lines and label != beside:
            axes.plot(*lines[beside], color="#bbb", lw=1)
        axes.plot(x, y, color="tab:blue", lw=1.3, **style)
        axes.set_title(label, fontsize=7.5, pad=2)
        axes.tick_params(labelsize=6, length=2, labelleft=i % columns == 0, labelbottom=i + columns >= len(lines))
        panels.append(axes)
    figure.supxlabel(across, fontsize=8)
    figure.supylabel(up, fontsize=8)
    return figure, panels


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    return figure, axes
