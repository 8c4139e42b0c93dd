"""The two hooks of the whole model: what is noted, watched and refused once per call."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import nn

from ...core.errors import LoraLiteWarning, StateError
from ..model.site import place, tensor_on
from ..model.state import STATE, ModelState
from ..view import kept as memo
from . import acting
from .batch import batch_first
from .context import with_context
from .invoked import note_cache
from .positions import locate
from .recompute import check_fed
from .virtual import lead
from .vocabulary import await_head, check_head, watch_vocabulary


def root_pre_hook(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Note the batch size, the gradient mode and, where an adapter asks, the token positions of a call of the whole
    model; run virtual tokens before it."""
    state: ModelState = model.__dict__[STATE]
    if not torch.compiler.is_compiling():
        state.in_call, state.call_grad = True, torch.is_grad_enabled()
        state.newly_gradless, state.fed = [], set()
        memo.begin(state, model, kwargs)
        if state.vocabulary:
            watch_vocabulary(model, state)
        acting.begin(model, state)
        if state.call_grad and model.training:
            _watch_schedules(state)
            _watch_dtypes(model, state)
            if state.vocabulary:
                await_head(model, state)
    call = locate(state, model, args, kwargs)
    if state.context:
        call = with_context(state, model, args, kwargs, call)
    if call is not state.call:  # an exporter follows no needless change
        state.call = call
    if state.rows is not None:  # reading the size would make a compiled model depend on it
        first = batch_first(model, args, kwargs)
        state.batch = None if first is None else int(first.shape[0])
    return lead(state, model, args, kwargs)


def root_post_hook(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Raise when a training call left something without a gradient: adapted layers, by a reentrant checkpoint, or what
    stands on a head that it did not call. Also called when the model failed, to end what was begun."""
    state: ModelState = model.__dict__[STATE]
    if state.call is not None:
        state.call = None
    if torch.compiler.is_compiling():
        return
    failed = output is None and sys.exc_info()[0] is not None
    idle = acting.end(model, state, failed)
    if state.begun and not failed:
        note_cache(state.begun, output)
    state.batch = state.memo = None
    state.in_call, had_grad = False, state.call_grad
    state.call_grad = False
    if failed:  # an exception is on its way
        return
    if had_grad and state.vocabulary and model.training:
        check_head(model, state)
    acting.tell(idle)
    if had_grad and state.gradless and model.training and torch.is_grad_enabled():
        check_fed(state, output)


def _watch_schedules(state: ModelState) -> None:
    """A method with a schedule that nobody drives is silently another method: raise at its second training forward."""
    for name, _ in state.active:
        record = state.records[name]
        if record.variant.on_step is None or record.scheduled or not record.trainable:
            continue
        record.train_calls += 1
        if record.train_calls > 1:
            raise StateError(
                f"adapter {name!r}: variant {record.variant.name!r} has a schedule and nothing steps it. Call "
                "ll.schedule(model, optimizer, total_steps) before training (again after loading or copying the "
                "model)."
            )


def _watch_dtypes(model: nn.Module, state: ModelState) -> None:
    """`model.to(dtype)` casts adapters too; in 16 bits small steps are rounded away, so say it once."""
    for name, _ in state.active:
        record = state.records[name]
        if record.cast_noticed or not record.trainable:
            continue
        target = next(iter(record.targets.values()))
        short = next((k for k, spec in target.specs.items() if spec.is_trained and spec.dtype is None), None)
        if short is None:
            continue
        path, attribute = place(target, short, name)
        tensor = tensor_on(model.get_submodule(path), attribute)
        if tensor is not None and tensor.dtype != target.cfg.torch_dtype:
            record.cast_noticed = True
            warnings.warn(
                f"adapter {name!r} was attached in {target.cfg.dtype} and is "
                f"{str(tensor.dtype).removeprefix('torch.')} now, because model.to(dtype) casts adapters too; small "
                f"steps may be rounded away. ll.adapters(model)[{name!r}].restore_dtype() casts it back.",
                LoraLiteWarning,
                stacklevel=2,
            )
