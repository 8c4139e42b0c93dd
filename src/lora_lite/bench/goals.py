"""The goals of `lora-lite bench`: the most that a figure may be, as a multiple of what was measured in the same run."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
JUDGED = ("S4", "M3", "layer-8b")
"""Sizes at which goals hold; a smaller model times the interpreter."""
RANK = 8
"""The rank at which the goals hold, unless `AT_RANK` names another."""
LOW_RANK = {"ours_forward_vs_base": 1.08, "ours_step_vs_base": 1.15}
VERBS = {"merge_vs_peft": 1.0, "unmerge_vs_copy": 1.25}
"""Of every method, on a layer of the size that people use."""
STEP = {"c3a": 0.7, "hira": 0.62, "shira": 1.2} | dict.fromkeys(("fourierft", "loha", "lokr", "peanut", "waveft"), 0.5)
"""Method -> the most that forward and backward may take, as a multiple of PEFT's; 1.0 for all others."""
TOKEN = {"fourierft": 0.05, "loha": 0.05}
"""The same of a token of a generation."""
GOALS: dict[str, dict[str, float]] = {
    "lora": {**LOW_RANK, "saved_vs_peft": 1.0},
    "lora+dropout": {"ours_forward_vs_base": 1.15, "ours_step_vs_base": 1.22, "saved_vs_peft": 0.5},
    "dora": LOW_RANK,
    "delora": {**LOW_RANK, "step_vs_peft": 0.98},
    "pissa": LOW_RANK,
    "gralora": LOW_RANK,
    "hra": {"ours_forward_vs_base": 1.13, "ours_step_vs_base": 1.18},
    "boft": {"ours_forward_vs_base": 1.25, "ours_step_vs_base": 1.38},
    "oft": {"ours_forward_vs_base": 1.10, "ours_step_vs_base": 1.10},
    "oft+series": {"ours_forward_vs_base": 1.10, "ours_step_vs_base": 1.10},
    "road": {"ours_forward_vs_base": 1.10, "ours_step_vs_base": 1.15, "saved_vs_peft": 0.6},
    "ia3": {"ours_forward_vs_base": 1.03, "ours_step_vs_base": 1.06, "step_vs_peft": 1.0},
}
"""Method -> figure -> the most it may be at rank 8. `ours_*_vs_base`: over the bare base, whose step is the forward
pass and the backward pass through activations alone, the least that training any adapter takes. `saved_vs_peft`: what
autograd keeps beyond the base, ours over PEFT's."""
AT_RANK: dict[tuple[str, int], dict[str, float]] = {("delora", 32): {"step_vs_peft": 1.0}}
AT_LAYER: dict[str, dict[str, float]] = {
    "lora": {"merge_vs_copy": 2.5, "ours_token_vs_base": 1.10},
    "dora": {"ours_token_vs_base": 1.15},
    "hra": {"ours_token_vs_base": 1.15},
    "oft": {"token_vs_peft": 1.0},
    **dict.fromkeys(("eva", "pissa", "lora_one", "lora_xs"), {"ours_attach_ms": 5000.0}),
    "corda": {"ours_attach_ms": 20000.0},
}
"""Goals at `layer-8b` alone. A copy is that of the weights which the adapter changes. A start is timed on weights
drawn at random, whose singular values lie closer together than those of trained ones, so it takes longest."""


def goals(row: Row) -> dict[str, float]:
    """Figure -> goal, of the figures that the row has."""
    method, size, r = row["method"], row.get("size", JUDGED[0]), row.get("r", RANK)
    if size not in JUDGED:
        return {}
    found = {"step_vs_peft": STEP.get(method, 1.0), "token_vs_peft": TOKEN.get(method, 1.0)}
    found = found | GOALS.get(method, {}) if r == RANK else dict(AT_RANK.get((method, r), {}))
    if size == "layer-8b":
        found |= VERBS | AT_LAYER.get(method, {})
    return {key: goal for key, goal in found.items() if key in row}


def judged(row: Row) -> dict[str, dict[str, Any]]:
    """Figure -> goal, what was reached, and "met" or "missed". A ratio misses when its lower quartile lies above the
    goal."""
    found = {}
    for key, goal in goals(row).items():
        figure = row[key]
        got = figure["q1"] if isinstance(figure, dict) else figure
        found[key] = {"goal": goal, "reached": got, "verdict": "met" if got <= goal else "missed"}
    return found


def verdicts(row: Row) -> dict[str, str]:
    """Figure -> "met" or "missed"."""
    return {key: found["verdict"] for key, found in judged(row).items()}


def missed(rows: list[Row]) -> list[str]:
    """A sentence for every goal that is missed."""
    return [
        f"{row['method']} {row['size']} {row['shape']} r={row['r']}: {key} {found['reached']:.2f} > {found['goal']:.2f}"
        for row in rows
        for key, found in judged(row).items()
        if found["verdict"] == "missed"
    ]
