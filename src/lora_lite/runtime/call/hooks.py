"""The two hooks of a target. Module-level functions, so that deepcopy, pickle and compilers follow them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import SelectionError, WeightError
from ..layers.virtual import PLACES, unwrap_output, wrap
from ..model.site import Site, Slot
from ..model.state import SITE
from ..view.composed import blend
from ..view.layer import LayerView
from ..view.spans import Call
from .grouped import grouped
from .recompute import selection_of
from .rows import row_groups


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
    key = None if args else first_name(layer, kwargs)
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
    x = args[0] if args else kwargs[first_name(layer, kwargs)]
    y = output[0] if isinstance(output, tuple) else output
    if not isinstance(y, Tensor):
        raise SelectionError(
            f"{site.path}: {type(layer).__name__} returns {type(y).__name__}, neither a tensor nor a tuple that "
            "begins with one."
        )
    if x.requires_grad and not y.requires_grad and torch.is_grad_enabled():
        raise WeightError(
            f"{site.path}: {type(layer).__name__} returns an output that is cut from its input's gradient, so layers "
            "before it would train on wrong gradients. Use a weight-only quantisation that is differentiable "
            "(bitsandbytes, torchao int8 weight-only, quanto)."
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
    """One call of a variant's page; its output has the dtype of what it rewrites. `strength` is what the page may read
    of its weight."""
    page = slot.forward_input if y is None else slot.forward
    if page is None:
        return x if y is None else y
    old = x if y is None else y
    view = LayerView(layer, slot, old.dtype, call, rows)
    view.strength = strength
    new = page(view, x) if y is None else page(view, x, y)
    return new if new.dtype == old.dtype else new.to(old.dtype)


def first_name(layer: nn.Module, kwargs: dict[str, Any]) -> str:
    """The name under which a keyword call passes x."""
    if len(kwargs) == 1:
        return next(iter(kwargs))
    first = next(iter(inspect.signature(type(layer).forward).parameters.values()), None)
    names = [first.name] if first is not None else []
    for name in (*names, *list(inspect.signature(layer.forward).parameters)[:1], "input", "x", "hidden_states"):
        if name in kwargs:
            return name
    raise SelectionError(f"{type(layer).__name__} was called with keywords {sorted(kwargs)} and no recognisable input.")
