"""The two hooks of a target. Module-level functions, so that deepcopy, pickle and compilers follow them."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import SelectionError, StateError, WeightError
from ..layers.offload import brought_back, is_away
from ..layers.tensors import laid_out_as
from ..model.call import Call, Extent, Rows, Selection
from ..model.site import Site, Slot
from ..model.state import SITE
from ..view.composed import blend
from ..view.layer import LayerView
from .acting import note_run
from .grouped import grouped
from .recompute import selection_of
from .rows import site_groups
from .stand_in import rest, stand_before, step_aside

ABSENT: Any = object()
COPIED = (
    "this layer was made from an adapted one by something that copied its hooks and nothing else of the adapter, as "
    "torch.ao's quantize_dynamic does. Merge first, and do it to a plain model: ll.merge(model); "
    "model.save_pretrained(folder); type(model).from_pretrained(folder)."
)
"""What a hook says that is called in another form than it was registered in."""


def pre_hook(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """x -> every active `forward_input`, in attach order."""
    if kwargs is None:
        raise StateError(COPIED)
    site: Site = layer.__dict__[SITE]
    if not (site.has_input or site.has_weight):
        return None
    if site.has_weight:
        step_aside(layer)  # what an interrupted call has left
    selection = selection_of(site)
    if not selection[0] and selection[1] is None:
        return None
    key = None if args else first_name(layer, kwargs)
    x = args[0] if key is None else kwargs[key]
    new = apply_selected(layer, site, x, None, selection)
    if site.has_weight and selection[1] is None:
        stand_before(layer, site, selection[0], selection[2])
    if new is x:
        return None
    return ((new, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: new})


def post_hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = ABSENT) -> Any:
    """y -> every active `forward`, in attach order, each seeing the rewritten x and the previous y."""
    if output is ABSENT:
        raise StateError(COPIED)
    site: Site = layer.__dict__[SITE]
    if site.awaited:
        note_run(site)
    stood_in = site.has_weight and step_aside(layer)
    if output is None and sys.exc_info()[0] is not None:  # the layer failed, and its exception is on its way
        return None
    selection = selection_of(site)
    if not selection[0] and selection[1] is None:
        return None
    x = args[0] if args else kwargs[first_name(layer, kwargs)]
    y = _usable(layer, site, x, output[0] if isinstance(output, tuple) else output)
    if stood_in:
        selection = (rest(layer, site, selection[0]), *selection[1:])
    inner_x, inner_y = site.kind.enter(layer, x, y)
    new = apply_selected(layer, site, inner_x, inner_y, selection)
    if new is inner_y:
        return None
    new = laid_out_as(site.kind.leave(layer, new, y), y)
    return (new, *output[1:]) if isinstance(output, tuple) else new


def _usable(layer: nn.Module, site: Site, x: Tensor, y: Any) -> Tensor:
    """What a layer returned, if pages can go on from it."""
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
    return y


def apply_selected(layer: nn.Module, site: Site, x: Tensor, y: Tensor | None, selection: Selection) -> Tensor:
    """The page of every selected adapter on this layer. y None: the input side."""
    if is_away(layer):
        with brought_back(layer, site.path):
            return _apply_selected(layer, site, x, y, selection)
    return _apply_selected(layer, site, x, y, selection)


def _apply_selected(layer: nn.Module, site: Site, x: Tensor, y: Tensor | None, selection: Selection) -> Tensor:
    active, rows, call, extent = selection
    if y is not None and x.dtype != y.dtype and isinstance(x, Tensor) and x.is_floating_point():
        x = x.to(y.dtype)  # autocast, or a layer that returns another dtype than it takes
    if rows is not None:
        return _apply_rows(layer, site, x, y, rows, call, extent)
    value = x if y is None else y
    for name, weight in active:
        slot = site.slots.get(name)
        if slot is not None:
            new = apply_page(layer, slot, *_sides(x, y, value), weight, call)
            value = new if slot.own_weight else blend(value, new, weight)
    return value


def _apply_rows(
    layer: nn.Module,
    site: Site,
    x: Tensor,
    y: Tensor | None,
    rows: Rows,
    call: Call | None,
    extent: Extent | None,
) -> Tensor:
    """The same with one adapter per row: several at once where they can, the rest one after the other."""
    value = x if y is None else y
    groups = site_groups(site, rows, extent, x)
    if site.kind.groups_rows:
        value, groups = grouped(layer, site, groups, x, y)
    for group in groups:
        slot = site.slots[group.name]
        if (slot.forward_input if y is None else slot.forward) is None:
            continue
        part = value.index_select(0, group.index)
        own_x = x if y is None else x.index_select(0, group.index)
        new = apply_page(layer, slot, *_sides(own_x, y, part), 1.0, call, group.index)
        if new is not part:
            value = value.index_copy(0, group.index, new)
    return value


def _sides(x: Tensor, y: Tensor | None, value: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a page takes when `value` is what the pages before it made of x, or of y."""
    return (value, None) if y is None else (x, value)


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
    if y is not None and y.shape[-1] != slot.d_out:
        raise SelectionError(
            f"adapter {slot.name!r} on {slot.path}: the output has {y.shape[-1]} features, and its tensors were made "
            f"for {slot.d_out}; a block that widens its stream, as the last of a stage, cannot carry it. Leave it "
            "out: exclude_names, or layers=."
        )
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
