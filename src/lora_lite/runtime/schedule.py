"""Methods with a schedule: `on_step` driven from the optimiser's own step hook. And the sum of their penalties."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.errors import StateError
from .layer import LayerView
from .state import SITE, Record, Slot, record_of, state_of, unwrap


def layer_views(model: nn.Module, record: Record) -> list[LayerView]:
    """One view per target, at storage precision."""
    model = unwrap(model)
    found = []
    for path in record.targets:
        layer = model.get_submodule(path)
        slot: Slot = layer.__dict__[SITE].slots[record.name]
        found.append(LayerView(layer, slot, None))
    return found


def schedule(model: nn.Module, optimizer: Optimizer, total_steps: int) -> None:
    """Drive every scheduled adapter (rank schedules, retractions) from `optimizer.step()`.

    Args:
        optimizer: the one that trains the adapters; `on_step` runs after each of its steps, gradients still there.
        total_steps: number of optimiser steps of the whole run; sets the schedule's length.

    Raises:
        StateError: no attached method has a schedule, or total_steps is not positive.
    """
    state = state_of(model)
    records = [r for r in state.records.values() if r.variant.on_step is not None]
    if not records:
        raise StateError("no attached adapter has a schedule, so ll.schedule has nothing to do; leave the call out.")
    if total_steps < 1:
        raise StateError(f"total_steps must be positive, got {total_steps}.")
    for record in records:
        record.total_steps = total_steps
        record.scheduled = True

    def after_step(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        for record in records:
            if state.records.get(record.name) is record and record.trainable:
                step_record(model, record)

    optimizer.register_step_post_hook(after_step)


def step_record(model: nn.Module, record: Record) -> None:
    """One `on_step` of one adapter."""
    record.steps += 1
    with torch.no_grad():
        record.variant.on_step(layer_views(model, record), record.cfg, record.steps)  # type: ignore[misc]


def penalty(model: nn.Module, name: str | None = None) -> Tensor:
    """Sum of the regularisers of one adapter, or of all active ones: add it to the loss. Zero for methods without any."""
    state = state_of(model)
    records = [record_of(model, name)] if name is not None else [state.records[n] for n, _ in state.active]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    total = torch.zeros((), device=device)
    for record in records:
        if record.variant.penalty is not None:
            for view in layer_views(model, record):
                total = total + record.variant.penalty(view)
    return total
