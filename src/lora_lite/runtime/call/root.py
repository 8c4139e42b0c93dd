"""The two hooks of the whole model: what is noted, watched and refused once per call."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..._torch import with_tensors
from ...core.errors import LoraLiteWarning, StateError
from ..model.site import place, tensor_on
from ..model.state import STATE, ModelState
from ..view import kept as memo
from . import acting
from .batch import extent_of
from .context import with_context
from .invoked import note_cache
from .positions import locate
from .recompute import check_fed, has_gradient
from .virtual import lead
from .vocabulary import await_head, check_head, watch_vocabulary


def root_pre_hook(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Note for this thread what acts in a call of the whole model, the gradient mode and, where an adapter asks, the
    batch and the token positions; run virtual tokens before it."""
    state: ModelState = model.__dict__[STATE]
    now = state.here.now
    compiling = torch.compiler.is_compiling()
    if not compiling:
        wait_for_change(state)
        now.in_call, now.grad = True, torch.is_grad_enabled()
        now.fed, now.newly_gradless = set(), []
        memo.begin(now, model, kwargs)
        if state.vocabulary:
            watch_vocabulary(model, state)
        acting.begin(model, state, args, kwargs)
        if now.grad and model.training:
            now.penalties = {}
            _watch_schedules(state)
            _watch_dtypes(model, state)
            if state.vocabulary:
                await_head(model, state)
    active, rows = state.choice()
    call = locate(state, active, rows, model, args, kwargs)
    call = with_context(state, model, args, kwargs, call)
    # reading the sizes would make a compiled model depend on them
    extent = None if rows is None else extent_of(model, state.parameters, args, kwargs)
    selection = None if compiling and call is None and extent is None else (active, rows, call, extent)
    if selection is not now.selection:  # an exporter follows no needless change
        now.selection = selection
    return lead(state, model, args, kwargs)


def root_post_hook(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Raise when a training call left something without a gradient: adapted layers, by a reentrant checkpoint, or what
    stands on a head that it did not call. Also called when the model failed, to end what was begun. While merged, the
    output of a training call is one that refuses a backward pass."""
    state: ModelState = model.__dict__[STATE]
    now = state.here.now
    if torch.compiler.is_compiling():
        if now.selection is not None:
            now.selection = None
        return None
    failed = output is None and sys.exc_info()[0] is not None
    idle = acting.end(model, state, failed)
    had_grad, begun = now.grad, now.begun
    now.end()
    if failed:  # an exception is on its way
        return None
    if begun:
        note_cache(state, begun, output)
    if had_grad and state.vocabulary and model.training:
        check_head(model, state)
    acting.tell(idle)
    if had_grad and state.gradless and model.training and torch.is_grad_enabled():
        check_fed(state, output)
    return refusing(state, output) if had_grad and model.training and state.merged is not None else None


def refusing(state: ModelState, output: Any) -> Any:
    """The output of a training call of a merged model, the same bits, which says why nothing learns instead of leaving
    that to torch: "element 0 of tensors does not require grad". None where something of the model does learn, or
    nothing was to."""
    assert state.merged is not None
    names = [name for name, _ in state.merged.active if state.records[name].trainable]
    if not names or not torch.is_grad_enabled() or has_gradient(output):
        return None
    flag = torch.zeros((), requires_grad=True)

    def refuse(leaf: Any) -> Any:
        return Merged.apply(leaf, flag, names[0]) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return with_tensors(refuse, output)


class Merged(torch.autograd.Function):
    """The identity, whose backward pass raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Any, flag: Any, name: str) -> Any:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise StateError(
            f"adapter {ctx.name!r} is merged into the weights, so nothing learns; call ll.unmerge(model) before "
            "training."
        )


def wait_for_change(state: ModelState) -> None:
    """Let a verb in another thread finish what it changes."""
    while state.changing not in (None, threading.get_ident()):
        time.sleep(1e-4)


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
