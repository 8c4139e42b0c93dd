"""Peak memory of a training step on tensors without values: of ours, of PEFT, and what `ll.cost` says on paper.

Every storage that an operation makes is counted from then until nothing refers to it, forward and backward, so the
figure is exact, the same on every machine, and takes no arithmetic. Memory that a kernel uses within itself is not
counted.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import TorchDispatchMode, fake_mode, storage_key, storage_reference
from ..cost.paper import Paper, without_weights
from .pairs import all_three, base, config
from .speed import step

MODES = ("kept", "recomputed")
"""Activations between the passes: all, or those of the blocks computed again (gradient checkpointing)."""


class Live(TorchDispatchMode):
    """The most bytes alive at a time of what is made inside; a view of the model's own tensors is nothing new."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.own = {storage_key(t) for t in (*model.parameters(), *model.buffers())}
        self.peak = self.now = 0
        self.alive: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, (list, tuple)) else (made,):
            if isinstance(t, Tensor) and t.layout == torch.strided:
                self._note(t)
        return made

    def _note(self, t: Tensor) -> None:
        if storage_key(t) in self.own:
            return
        reference = storage_reference(t)
        before = self.alive.get(reference.cdata)
        if before is not None and not before[0].expired():
            return
        self.now += t.untyped_storage().nbytes() - (before[1] if before is not None else 0)
        self.alive[reference.cdata] = (reference, t.untyped_storage().nbytes())
        if self.now > self.peak:  # before it is believed, what is gone is taken off
            self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
            self.now = sum(size for _, size in self.alive.values())
            self.peak = max(self.peak, self.now)


def peak(model: Any, rows: int, length: int) -> int:
    """Bytes at the peak of a step, beyond weights and adapter; the model's tensors are given back as they were."""
    mode = fake_mode()
    with without_weights(model, mode), mode, Live(model) as live:
        step(model, torch.zeros(rows, length, dtype=torch.long))
    return live.peak


@contextmanager
def recomputed(model: Any, on: bool) -> Any:
    """The blocks' activations computed again in backward."""
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if on:
            model.gradient_checkpointing_disable()


def measure(method: str, size: str, rows: int, length: int, r: int) -> dict[str, Any]:
    """A row: bytes beyond the bare base's at the peak, of ours, of PEFT's and on paper, for both `MODES`.

    PEFT's is missing where it has no such method, keeps tensors beside its modules' own, or asks for their values:
    `peft_left_out` is what torch said. Paper is what `ll.cost` says is saved, and the gradients of what is trained,
    which stand at the end.
    """
    models = all_three(size, method, r)
    cost = Paper(base(size), rows, length).cost(config(method, r))
    stated = {"kept": cost.extra_saved, "recomputed": cost.extra_checkpointed}
    row: dict[str, Any] = {"method": method, "size": size, "shape": f"{rows}x{length}", "r": r}
    for mode in MODES:
        found = {}
        for name, model in models.items():
            with recomputed(model, mode == "recomputed"):
                try:
                    found[name] = peak(model, rows, length)
                # torch's: of tensors that the model does not know as its own, or of a step that asks for a value
                except (AssertionError, RuntimeError) as e:
                    if name != "peft":
                        raise
                    row["peft_left_out"] = repr(e)[:200]
        row[mode] = {
            "base": found["base"],
            "paper": stated[mode] + cost.gradient_bytes,
            **{name: value - found["base"] for name, value in found.items() if name != "base"},
        }
    return row


COLUMNS = ("method", "model", "tokens", "kept: ours", "PEFT", "of paper", "recomputed: ours", "PEFT", "of paper")


def cells(row: dict[str, Any]) -> list[str]:
    """A row in MB beyond the base's peak; of paper: the whole peak over the base's and what is stated beyond it."""
    found = [row["method"], row["size"], row["shape"]]
    for mode in MODES:
        of = row[mode]
        found += [_mb(of["ours"]), _mb(of.get("peft")), f"{of_paper(of):.2f}"]
    return found


def of_paper(of: dict[str, int]) -> float:
    """The peak over the sum of the base's own and what is stated of the adapter."""
    return (of["base"] + of["ours"]) / (of["base"] + of["paper"])


def _mb(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.1f}"
