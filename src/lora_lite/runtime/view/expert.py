"""The matrices inside a layer as pages see them: one view each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..._torch import functorch_is_active, inside_checkpoint
from ...core.errors import StateError
from ..layers.bank import Bank
from ..layers.tensors import device_of
from ..model.call import Chosen
from ..model.kind import Cell
from ..model.record import Record
from ..model.site import Site, Slot, tensor_on
from ..model.state import SITE, unwrap
from .composed import Composed
from .folded import adapted_matrix
from .layer import DenseView, LayerView
from .unformed import Unformed


def layer_views(model: nn.Module, record: Record) -> list[LayerView]:
    """One view per target of the adapter's own method, at storage precision, not in training."""
    model = unwrap(model)
    found: list[LayerView] = []
    for path, target in record.targets.items():
        if target.cfg.variant != record.cfg.variant:
            continue
        layer = model.get_submodule(path)
        slot: Slot = layer.__dict__[SITE].slots[record.name]
        view = LayerView(layer, slot, None)
        view.still = True
        found.append(view)
    for view in found:
        view.peers = len(found)
    return found


def matrix_views(view: LayerView) -> Iterator[LayerView]:
    """The view itself, or one for each of several matrices, such as a bank's experts."""
    module, slot = view._module, view._slot
    site: Site = module.__dict__[SITE]
    if not site.kind.copies(module):
        yield view
        return
    for cell in site.kind.cells(module, site.path):
        w, _ = cell.read(torch.float32)
        one = DenseView(module, slot, w, None, sliced(stored_tensors(module, slot), cell))
        one._dtype, one.peers = view._dtype, view.peers
        yield one


def stored_tensors(module: nn.Module, slot: Slot) -> dict[str, Tensor]:
    """Short name -> stored tensor of one adapter on its layer; shared ones from their owner, on this layer's device.

    Raises:
        StateError: a tensor is gone.
    """
    found = {}
    for short, attribute in slot.keys.items():
        t = tensor_on(slot.owners.get(short, module), attribute)
        if t is None:
            raise StateError(
                f"adapter {slot.name!r}: {slot.path}.{attribute} is gone; detach and load the adapter again."
            )
        found[short] = t if short not in slot.owners else t.to(device_of(module))
    return found


def sliced(tensors: dict[str, Tensor], cell: Cell) -> dict[str, Tensor]:
    """The part of stacked tensors that belongs to one of several matrices."""
    return {k: t[cell.index] for k, t in tensors.items()}


def with_adapters(
    module: nn.Module, cell: Cell, slots: list[tuple[Slot, float]], w: Tensor, b: Tensor | None
) -> Composed:
    """One matrix with these adapters as a function of x."""
    views = []
    for slot, weight in slots:
        own = stored_tensors(module, slot) if cell.index is None else sliced(stored_tensors(module, slot), cell)
        views.append((slot, weight, DenseView(module, slot, w, b, own)))
    return Composed(views, w, b)


def still_with_adapters(
    module: nn.Module, cell: Cell, slots: list[tuple[Slot, float]], w: Tensor, dtype: torch.dtype
) -> Composed:
    """The same in `dtype` and without gradients, W in the dtype in which it is stored."""
    b, views = cell.bias(dtype), []
    for slot, weight in slots:
        own = {k: t.detach() for k, t in stored_tensors(module, slot).items()}
        own = own if cell.index is None else sliced(own, cell)
        views.append((slot, weight, DenseView(module, slot, w, b, own, dtype)))
    return Composed(views, w, b)


def adapted(bank: Bank, site: Site, chosen: Chosen) -> tuple[Tensor, Tensor | None]:
    """(W' (E, d_out, d_in), b' (E, d_out) or None) of these adapters with their weights, in the base's dtype, with
    gradients to their tensors. Methods with `factors` leave their product unformed; what others go through on the way
    to W' is not kept for the backward pass, which goes that way again."""
    w, b = bank.dense(), bank.bias
    slots = [(site.slots[n], weight) for n, weight in chosen if n in site.slots]
    if all(slot.factors is not None and slot.forward_input is None and not slot.own_weight for slot, _ in slots):
        return _plus_factors(bank, slots, w), b
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or functorch_is_active() or inside_checkpoint():
        return _dense(bank, site, slots)
    own = [t for slot, _ in slots for t in stored_tensors(bank, slot).values()]
    before = [t._version for t in own]

    def build() -> tuple[Tensor, Tensor | None]:
        if [t._version for t in own] != before:
            raise StateError(
                f"{site.path}: an adapter's tensors were changed between the forward pass and its backward pass, which "
                "builds the experts' weights anew from them. Call backward before optimizer.step()."
            )
        return _dense(bank, site, slots)

    return checkpoint(build, use_reentrant=False, preserve_rng_state=False)


def _dense(bank: Bank, site: Site, slots: list[tuple[Slot, float]]) -> tuple[Tensor, Tensor | None]:
    """W' and b' of all experts, formed."""
    w, b = bank.dense(), bank.bias
    wide = torch.promote_types(w.dtype, torch.float32)
    new, shifts = [], []
    for cell in site.kind.cells(bank, site.path):
        own_w, own_b = cell.read(wide)
        f = with_adapters(bank, cell, slots, own_w, None)  # with b, W + b − b would round
        new.append(adapted_matrix(f, cell).to(w.dtype))
        if b is not None:
            zero = own_w.new_zeros(1, bank.d_in)
            shifts.append(with_adapters(bank, cell, slots, own_w, own_b)(zero)[0].to(b.dtype))
    return torch.stack(new), None if b is None else torch.stack(shifts)


def _plus_factors(bank: Bank, slots: list[tuple[Slot, float]], w: Tensor) -> Tensor:
    """w + Σ weight B A of all experts, as thin products beside the base's own; compiled code gets the sum."""
    left, right = [], []
    for slot, weight in slots:
        A, B = _factors(bank, slot, w)
        left.append((weight * B).to(w.dtype))
        right.append(A.to(w.dtype))
    L, R = torch.cat(left, -1), torch.cat(right, -2)
    return torch.baddbmm(w, L, R) if torch.compiler.is_compiling() else Unformed.of(w, L, R)


def _factors(bank: Bank, slot: Slot, w: Tensor) -> tuple[Tensor, Tensor]:
    """A (E, k, d_in) and B (E, d_out, k) of one adapter."""
    factors = slot.factors
    assert factors is not None
    return torch.vmap(lambda W, t: factors(DenseView(bank, slot, W, None, t)))(w, stored_tensors(bank, slot))
