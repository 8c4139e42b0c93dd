"""What the page of speeds says first: what is won, what is equal and what is lost against PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

EQUAL = 0.05
"""Ratios nearer to 1 than this are called equal."""


def headline(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of markdown: a training step of each method, the best first, and the picture of all."""
    found: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}
    for row in rows:
        if "step_vs_peft" in row:
            found.setdefault(row["method"], []).append(row["step_vs_peft"]["median"])
        if row.get("peft_extra_saved_mb"):
            memory.setdefault(row["method"], []).append(row["ours_extra_saved_mb"] / row["peft_extra_saved_mb"])
    ordered = sorted(found, key=lambda method: min(found[method]))
    won = [m for m in ordered if max(found[m]) < 1 - EQUAL]
    lost = [m for m in ordered if max(found[m]) > 1 + EQUAL]
    equal = [m for m in ordered if m not in won and m not in lost]
    lines = []
    if won:
        lines.append(f"A training step is faster than PEFT's with {listed(won, found)}.")
    if equal:
        lines.append(f"It is the same within {EQUAL:.0%}, or faster, with {listed(equal, found)}.")
    if lost:
        lines.append(f"It is slower in some shape with {listed(lost, found)}.")
    less = [m for m in sorted(memory, key=lambda m: min(memory[m])) if max(memory[m]) < 1 - EQUAL]
    if less:
        lines.append(f"Less is kept for the backward pass with {listed(less, memory)}.")
    if not lines:
        return []
    return [
        " ".join(lines) + " The figures: lora-lite / PEFT, the least and the most over models, shapes and ranks.",
        "",
        "![Forward and training step of each method against PEFT](speed.png)",
        "",
    ]


def listed(methods: Sequence[str], ratios: dict[str, list[float]]) -> str:
    """`boft` (0.13 to 0.16), `dora` (0.77)."""
    shown = []
    for method in methods:
        low, high = (f"{f(ratios[method]):.2f}" for f in (min, max))
        shown.append(f"`{method}` ({low if low == high else f'{low} to {high}'})")
    return ", ".join(shown)
