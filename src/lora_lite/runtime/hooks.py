"""The two hooks of a target. Module-level functions, so that deepcopy, pickle and compilers follow them."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import LoraLiteWarning, SelectionError, StateError, WeightError
from . import memo
from .grouped import grouped
from .layer import LayerView
from .outside import watch_vocabulary
from .positions import Call, locate
from .recompute import selection_of
from .rows import blend, row_groups
from .state import SITE, STATE, ModelState, Site, Slot, stored_name, tensor_on
from .virtual import PLACES, unwrap_output, wrap


def pre_hook(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """x -> every active `forward_input`, in attach order."""
    site: Site = layer.__dict__[SITE]
    if not site.has_input:
        return None
    active, rows, call = selection_of(site.state)
    if not active and rows is None:
        return None
    key = None if args else _first_name(layer, kwargs)
    x = args[0] if key is None else kwargs[key]
    new = run(layer, site, x, None, active, rows, call)
    if new is x:
        return None
    return ((new, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: new})


def post_hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """y -> every active `forward`, in attach order, each seeing the rewritten x and the previous y."""
    site: Site = layer.__dict__[SITE]
    active, rows, call = selection_of(site.state)
    if not active and rows is None:
        return None
    x = args[0] if args else kwargs[_first_name(layer, kwargs)]
    y = output[0] if isinstance(output, tuple) else output
    if not isinstance(y, Tensor):
        raise SelectionError(
            f"{site.path}: {type(layer).__name__} returns {type(y).__name__}, neither a tensor nor a tuple that begins with one."
        )
    if x.requires_grad and not y.requires_grad and torch.is_grad_enabled():
        raise WeightError(
            f"{site.path}: {type(layer).__name__} returns an output that is cut from its input's gradient, so layers before it would train "
            "on wrong gradients. Use a weight-only quantisation that is differentiable (bitsandbytes, torchao int8 weight-only, quanto)."
        )
    if site.kind in PLACES:
        virtual, flat = wrap(layer, site.kind, x, y)
        return unwrap_output(site.kind, run(layer, site, virtual, flat, active, rows, call))  # type: ignore[arg-type]
    new = run(layer, site, x, y, active, rows, call)
    if new is y:
        return None
    return (new, *output[1:]) if isinstance(output, tuple) else new


def run(
    layer: nn.Module,
    site: Site,
    x: Tensor,
    y: Tensor | None,
    active: tuple[tuple[str, float], ...],
    rows: tuple[str | None, ...] | None,
    call: Call | None,
) -> Tensor:
    """The page of every selected adapter on this layer. y None: the input side."""
    value = x if y is None else y
    if y is not None and x.dtype != y.dtype and isinstance(x, Tensor) and x.is_floating_point():
        x = x.to(y.dtype)  # autocast, or a layer that returns another dtype than it takes
    if rows is None:
        for name, weight in active:
            slot = site.slots.get(name)
            if slot is not None:
                pair = (value, None) if y is None else (x, value)
                new = apply_page(layer, slot, *pair, weight, call)
                value = new if slot.own_weight else blend(value, new, weight)
        return value
    groups = row_groups(site, rows, x)
    if site.kind == "linear":
        value, groups = grouped(layer, site, groups, x, y)
    for group in groups:
        slot = site.slots[group.name]
        if (slot.forward_input if y is None else slot.forward) is None:
            continue
        part = value.index_select(0, group.index)
        pair = (part, None) if y is None else (x.index_select(0, group.index), part)
        new = apply_page(layer, slot, *pair, 1.0, call, group.index)
        if new is not part:
            value = value.index_copy(0, group.index, new)
    return value


def apply_page(
    layer: nn.Module,
    slot: Slot,
    x: Tensor,
    y: Tensor | None,
    strength: float = 1.0,
    call: Call | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """One call of a variant's page; its output has the dtype of what it rewrites. `strength` is what the page may read of its weight."""
    page = slot.forward_input if y is None else slot.forward
    if page is None:
        return x if y is None else y
    old = x if y is None else y
    view = LayerView(layer, slot, old.dtype, call, rows)
    view.strength = strength
    new = page(view, x) if y is None else page(view, x, y)
    return new if new.dtype == old.dtype else new.to(old.dtype)


def root_pre_hook(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note the batch size, the gradient mode and, where an adapter asks, the token positions of a call of the whole model."""
    state: ModelState = model.__dict__[STATE]
    if not torch.compiler.is_compiling():
        state.in_call, state.call_grad = True, torch.is_grad_enabled()
        state.cut_by_checkpoint = False
        memo.begin(state, model, kwargs)
        if state.vocabulary:
            watch_vocabulary(model, state)
        if state.call_grad and model.training:
            _watch_schedules(state)
            _watch_dtypes(model, state)
    call = locate(state, model, args, kwargs)
    if call is not state.call:  # an exporter follows no needless change
        state.call = call
    if state.rows is None:  # reading the size would make a compiled model depend on it
        return
    state.batch = None
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            state.batch = int(value.shape[0])
            break


def root_post_hook(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Raise when a reentrant checkpoint left the whole training call without a gradient."""
    state: ModelState = model.__dict__[STATE]
    if state.call is not None:
        state.call = None
    if torch.compiler.is_compiling():
        return
    state.batch = state.memo = None
    state.in_call, had_grad = False, state.call_grad
    state.call_grad = False
    if not (had_grad and state.cut_by_checkpoint and model.training and torch.is_grad_enabled()):
        return
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else (output,)
    if any(isinstance(v, Tensor) and v.requires_grad for v in values):
        return
    raise SelectionError(
        "gradient checkpointing with use_reentrant=True runs the blocks without gradient because no input requires one, so no adapter would train. "
        "Call model.enable_input_require_grads(), or enable checkpointing with use_reentrant=False."
    )


def _watch_schedules(state: ModelState) -> None:
    """A method with a schedule that nobody drives is silently another method: raise at its second training forward."""
    for name, _ in state.active:
        record = state.records[name]
        if record.variant.on_step is None or record.scheduled or not record.trainable:
            continue
        record.train_calls += 1
        if record.train_calls > 1:
            raise StateError(
                f"adapter {name!r}: variant {record.variant.name!r} has a schedule and nothing steps it. "
                "Call ll.schedule(model, optimizer, total_steps) before training (again after loading or copying the model)."
            )


def _watch_dtypes(model: nn.Module, state: ModelState) -> None:
    """`model.to(dtype)` casts adapters too; in 16 bits small steps are rounded away, so say it once."""
    for name, _ in state.active:
        record = state.records[name]
        if record.cast_noticed or not record.trainable:
            continue
        path, target = next(iter(record.targets.items()))
        short = next((k for k, spec in target.specs.items() if spec.is_trained and spec.dtype is None), None)
        tensor = tensor_on(model.get_submodule(path), stored_name(short, name)) if short is not None else None
        if tensor is not None and tensor.dtype != target.cfg.torch_dtype:
            record.cast_noticed = True
            warnings.warn(
                f"adapter {name!r} was attached in {target.cfg.dtype} and is {str(tensor.dtype).removeprefix('torch.')} now, because "
                f"model.to(dtype) casts adapters too; small steps may be rounded away. ll.adapters(model)[{name!r}].restore_dtype() casts it back.",
                LoraLiteWarning,
                stacklevel=2,
            )


def _first_name(layer: nn.Module, kwargs: dict[str, Any]) -> str:
    """The name under which a keyword call passes x."""
    if len(kwargs) == 1:
        return next(iter(kwargs))
    first = next(iter(inspect.signature(type(layer).forward).parameters.values()), None)
    names = [first.name] if first is not None else []
    for name in (*names, *list(inspect.signature(layer.forward).parameters)[:1], "input", "x", "hidden_states"):
        if name in kwargs:
            return name
    raise SelectionError(f"{type(layer).__name__} was called with keywords {sorted(kwargs)} and no recognisable input.")
