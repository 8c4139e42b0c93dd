"""Methods with a schedule: `on_step` driven from the optimiser's own step hook. And the sum of their penalties."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._torch import hook_tables, within_step
from ..core.arguments import checked
from ..core.config import AdapterConfig
from ..core.errors import StateError
from ..core.targets import StepTargets as Promised
from .model.record import Record
from .model.site import owned_tensors
from .model.state import ModelState, record_of, state_of
from .model.undo import Undo, all_or_nothing, restoring
from .view.expert import layer_views, matrix_views
from .view.layer import LayerView


class StepTargets(list[LayerView]):
    """The targets as `on_step` sees them, at storage precision, and the length of the schedule."""

    def __init__(self, views: Iterable[LayerView], total_steps: int) -> None:
        super().__init__(views)
        self.total_steps = total_steps


if TYPE_CHECKING:
    _: type[Promised[AdapterConfig]] = StepTargets


@checked
def schedule(model: nn.Module, optimizer: Optimizer, total_steps: int) -> None:
    """Drive every scheduled adapter (rank schedules, retractions) from `optimizer.step()`.

    Call it once before training, and again after loading or copying the model: an adapter that was saved at step 50
    goes on with step 51. With gradient accumulation the schedule counts optimiser steps, not batches. A later call
    replaces an earlier one.

    Args:
        optimizer: the one that trains the adapters; `on_step` runs after each of its steps, gradients still there.
        total_steps: number of optimiser steps of the whole run, those before a resume included; sets the schedule's
            length.

    Raises:
        StateError: no attached method has a schedule, the optimiser trains none of them, or total_steps is not
            positive.
    """
    state = state_of(model)
    optimizer = torch_optimizer(optimizer)
    driven = _driven_by(optimizer, model, state)
    if total_steps < 1:
        raise StateError(f"total_steps must be positive, got {total_steps}.")
    numbers = [record.schedule_number + 1 for record in driven]

    def after_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if within_step(optimizer):
            return
        for record, number in zip(driven, numbers, strict=True):
            if state.records.get(record.name) is record and record.schedule_number == number and record.trainable:
                step_record(model, record)

    def steps(undo: Undo) -> None:
        undo(restoring(*driven, *hook_tables(optimizer)))
        for record, number in zip(driven, numbers, strict=True):
            record.total_steps, record.scheduled, record.train_calls = total_steps, True, 0
            record.schedule_number = number
        optimizer.register_step_post_hook(after_step)

    all_or_nothing(steps)


def _driven_by(optimizer: Optimizer, model: nn.Module, state: ModelState) -> list[Record]:
    """The scheduled adapters of which the optimiser trains a tensor; there must be one."""
    records = [r for r in state.records.values() if r.variant.on_step is not None]
    if not records:
        raise StateError("no attached adapter has a schedule, so ll.schedule has nothing to do; leave the call out.")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    driven = [r for r in records if any(id(t) in held for _, _, _, t in owned_tensors(model, r))]
    if not driven:
        raise StateError(
            f"the optimiser trains no tensor of {', '.join(repr(r.name) for r in records)}. Build it from "
            "adapter.parameters() after attaching or loading."
        )
    return driven


def torch_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimiser inside the wrappers of accelerate and others, whose step hooks do not run."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise StateError(
            f"{type(optimizer).__name__} is no torch.optim.Optimizer, so its steps cannot be followed; pass the "
            "optimiser inside it."
        )
    return optimizer


def step_record(model: nn.Module, record: Record) -> None:
    """One `on_step` of one adapter."""
    record.steps += 1
    with torch.no_grad():
        targets = StepTargets(layer_views(model, record), record.total_steps)
        record.variant.on_step(targets, record.cfg, record.steps)  # type: ignore[misc]


@checked
def penalty(model: nn.Module, name: str | None = None) -> Tensor:
    """Sum of the regularisers of one adapter, or of all active ones: add it to the loss. Zero for methods without any.

    Those that have seen the activations (the load of a router) are of this thread's last training call of the model."""
    state = state_of(model)
    records = [record_of(model, name)] if name is not None else [state.records[n] for n, _ in state.active]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    total = torch.zeros((), device=device)
    for record in records:
        if record.variant.penalty is not None:
            for view in layer_views(model, record):
                for one in matrix_views(view):
                    total = total + record.variant.penalty(one).to(device)
        for (owner, path), value in state.here.now.penalties.items():
            if owner == record.name and path in record.targets:
                total = total + value.to(device)
    return total
