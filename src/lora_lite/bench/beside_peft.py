"""The same start, rows, rate and optimiser here and in PEFT: loss curves that lie on each other where the mathematics
is the same, and the gap where a method departs from PEFT's on purpose.

The start is PEFT's: its fresh adapter is saved, and read here. Where it is read as another method, the tensors that
both have are PEFT's, and the rest starts here as in `ll.attach`.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite as ll

from .learn import APART, Task, machine
from .pairs import PAIRS, config, has_peft, peft_config

__all__ = ["COLUMNS", "METHODS", "cells", "has_peft", "markdown", "picture", "run"]
METHODS = tuple(name for name in PAIRS if "+" not in name)
"""What both have at one size."""
START = "PEFT's"
NARROW: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "road": ({}, {"group_size": 16}),
    "c3a": ({"block": 16}, {"block_size": 16}),
    "vblora": ({"length": 16}, {"vector_length": 16}),
    "pissa": ({}, {"init_lora_weights": "pissa"}),
}
"""Our fields and PEFT's where the sizes of `PAIRS` do not divide the widths of the bundled base, or a start is near."""
SAME_TENSORS = {"glora": {f"lora_{k}{end}": f"glora_{k}.default.X{end}" for k in "AB" for end in "du"}}
"""Method that PEFT's file is not read as -> our tensor's name and PEFT's."""
WHY = {
    "adamss": "clusters of its own, from another k-means",
    "c3a": "rounding, which a rate of 0.1 magnifies",
    "delora": "a frozen half in the place of B = 0, where the first step jumps",
    "dora": "gains 1 + δ, whose steps Adam makes in shares of a row",
    "frod": "sparse places of its own",
    "lily": "a router for each token, where PEFT's averages over the batch",
    "osf": "the change stays in its subspace, which Adam's steps leave in PEFT",
    "pvera": "noise of its own",
    "waveft": "rounding",
}
"""Method -> why its curves part."""
SAME = 1e-3
"""Relative gap of the last losses below which two curves are called the same."""
Tick = Callable[[int, int], None]


def run(
    task: Task, method: str, steps: int, seed: int = 1, r: int = 8, tick: Tick = lambda a, b: None
) -> dict[str, Any]:
    """Both curves at the method's recommended rate for all tensors, without decay, clipping or a schedule.

    Returns:
        A row of plain data: `method`, `task`, `seed`, `lr`, `steps`, the losses of `ours` and `peft`, `start_apart` and
        `last_apart` (relative differences of the first loss and of the mean of the last ten), and PEFT's type. Where
        PEFT holds no such adapter, `refused` says why.
    """
    variant = ll.get_variant(method)
    row: dict[str, Any] = {"method": method, "task": task.name, "seed": seed, "lr": variant.lr, "steps": steps}
    try:
        model, rival, kind, start = both(task, method, r, seed)
    except (ll.LoraLiteError, ValueError, ImportError) as e:
        return {**row, "refused": str(e).splitlines()[0], **machine()}
    mine, theirs = ll.adapters(model)["default"].parameters(), rival.parameters()
    ours = steps_of(model, at_rate(mine, variant.lr), task, steps, seed)
    peft = steps_of(rival, at_rate(theirs, variant.lr), task, steps, seed)
    losses: dict[str, list[float]] = {"ours": [], "peft": []}
    for step, (a, b) in enumerate(zip(ours, peft, strict=True), 1):
        losses["ours"].append(a)
        losses["peft"].append(b)
        tick(step, steps)
    apart = {"start_apart": _apart(losses, slice(0, 1)), "last_apart": _apart(losses, slice(-10, None))}
    return {**row, "peft_type": kind, "start": start, **losses, **apart, **machine()}


def both(task: Task, method: str, r: int, seed: int) -> tuple[nn.Module, nn.Module, str, str]:
    """Our model, PEFT's, PEFT's type, and whose start it is.

    Raises:
        LoraLiteError: our method refuses the size.
        ValueError: PEFT refuses it.
        ImportError: PEFT asks for a package that is not here.
    """
    import peft

    model, base = task.load(), task.load()
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft_config(method, r)
        for name, value in NARROW.get(method, ({}, {}))[1].items():
            setattr(theirs, name, value)
        rival: Any = peft.get_peft_model(base, theirs)
        rival.save_pretrained(folder)
        try:
            ll.load(model, folder, trainable=True)
            read = ll.adapters(model)["default"]
        except ll.FileError:  # a start that PEFT takes off the base, or a function that no method here is
            read = None
        start = START
        if read is None or read.cfg.variant != method:
            start = _own_start(model, read, task, method, r)
        if method in SAME_TENSORS:
            start = _copied(model, rival.base_model.model, SAME_TENSORS[method])
        kind = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
    return model, rival, kind, start


def _own_start(model: nn.Module, read: ll.Adapter | None, task: Task, method: str, r: int) -> str:
    """Our method where PEFT's adapter is read as another one, with those of its tensors that both have."""
    given = {} if read is None else {k: v.clone() for k, v in model.state_dict().items() if ".lora_" in k}
    if read is not None:
        ll.detach(model)
    cfg = dataclasses.replace(config(method, r), **task.fields, **NARROW.get(method, ({}, {}))[0])
    ll.attach(model, cfg)
    shared = {k: v for k, v in given.items() if k in model.state_dict()}
    model.load_state_dict(shared, strict=False)
    return START if shared else "own"


def _copied(model: nn.Module, rival: nn.Module, names: dict[str, str]) -> str:
    """Put PEFT's start into ours."""
    for path in ll.adapters(model)["default"].targets:
        for own, theirs in names.items():
            getattr(model.get_submodule(path), own).data.copy_(attrgetter(theirs)(rival.get_submodule(path)).data)
    return START


def at_rate(parameters: Iterable[nn.Parameter], lr: float) -> list[dict[str, Any]]:
    """What is trained, all at one rate: the ratios that methods give some tensors are no part of the mathematics."""
    return [{"params": [p for p in parameters if p.requires_grad], "lr": lr}]


def steps_of(model: nn.Module, groups: Any, task: Task, steps: int, seed: int) -> Iterator[float]:
    """Loss after loss of plain AdamW."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    model.train()
    for step in range(steps):
        loss: Tensor = model(**task.batch(seed * APART + step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield round(float(loss.detach()), 6)


def _apart(losses: dict[str, list[float]], part: slice) -> float:
    ours, peft = (sum(losses[who][part]) / len(losses[who][part]) for who in ("ours", "peft"))
    return float(f"{abs(ours - peft) / abs(peft):.3g}")


COLUMNS = (
    "method", "PEFT's type", "lr", "steps", "start", "start apart", "first loss", "last losses, ours", "PEFT's", "apart"
)  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    if "refused" in row:
        return [row["method"], "-", f"{row['lr']:g}", *["-"] * 6, row["refused"]]
    ends = [f"{sum(row[who][-10:]) / len(row[who][-10:]):.4f}" for who in ("ours", "peft")]
    apart = "the same" if row["last_apart"] < SAME else f"{row['last_apart']:.1%}"
    if row["last_apart"] >= SAME and row["method"] in WHY:
        apart += f": {WHY[row['method']]}"
    first = [row["method"], row["peft_type"], f"{row['lr']:g}", str(row["steps"]), row.get("start", START)]
    return [*first, f"{row['start_apart']:.0e}", f"{row['ours'][0]:.4f}", *ends, apart]


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """The section of the committed page."""
    if not rows:
        return []
    return [
        "",
        "## Beside PEFT",
        "",
        "A fresh adapter of PEFT's is read here and trained in both; start `own`: its random tensors have no "
        "counterpart here, and each starts by itself. The same rows, AdamW at the recommended rate, no "
        f"schedule. Losses of the last ten steps; below {SAME:.1%} of each other the curves are called the same. What "
        "is further apart says why; more in [departures](../departures.md).",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
        *("| " + " | ".join(cells(row)) + " |" for row in ordered(rows)),
    ]


def ordered(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """By method's name."""
    return sorted(rows, key=lambda row: row["method"])


def picture(rows: list[dict[str, Any]]) -> Any:
    """A small picture for every method: our curve, and PEFT's dashed upon it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = sorted((row for row in rows if "refused" not in row), key=lambda row: row["method"])
    across = 3 if len(shown) < 10 else 6
    down = -(-len(shown) // across)
    figure = Figure(figsize=(8.0 if across == 3 else 11.0, 1.5 * down + 0.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for i, row in enumerate(shown):
        axes = figure.add_subplot(down, across, i + 1)
        axes.plot(row["ours"], lw=1.6, color="tab:blue", label="lora-lite")
        axes.plot(row["peft"], lw=1.2, ls="--", color="tab:orange", label="PEFT")
        axes.set_title(row["method"], fontsize=8, pad=2)
        axes.tick_params(labelsize=6, length=2)
        axes.grid(alpha=0.25)
        if i == 0:
            axes.legend(frameon=False, fontsize=7)
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("training loss", fontsize=8)
    return figure
