"""Pages that say what becomes of the weight (`weight`), on plain linear layers: one product with W' in place of two.

From the pre-hook to the post-hook, W' stands before the stored parameter as a plain attribute of the layer; the
parameter itself is not touched. Everywhere else the page's `forward`, which follows from `weight`, gives the same
function: in 16-bit layers and under autocast, where W + ΔW would round ΔW away, in compiled code, in mixed rows, behind
a page that has changed y, and on layers whose weight is packed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..model.call import Call, Chosen
from ..model.site import Site, Slot
from ..view.composed import blend
from ..view.layer import LayerView
from .turns import swap_in, swap_out

PARAMETER = "weight"
EXACT = (torch.float32, torch.float64)
"""Weights to which a small change can be added without losing it."""


def stand_before(layer: nn.Module, site: Site, chosen: Chosen, call: Call | None) -> None:
    """Put W' before the stored weight, if adapters that act first on y say what it is."""
    if torch.compiler.is_compiling():
        return
    slots = leading(layer, site, chosen)
    stored = layer._parameters.get(PARAMETER)
    if not slots or stored is None or not _takes(layer, site, stored):
        return
    W = new = LayerView(layer, slots[0][0], stored.dtype).weight
    for slot, strength in slots:
        view = LayerView(layer, slot, W.dtype, call)
        view.strength = strength
        other = blend(W, _made(slot, view, W, stored), 1.0 if slot.own_weight else strength)
        new = other if new is W else new + (other - W)
    swap_in(layer, {PARAMETER: site.kind.as_stored(layer, new)})


def _made(slot: Slot, view: LayerView, W: Tensor, stored: Tensor) -> Tensor:
    """W' of one adapter, kept from token to token while a model generates."""
    page = slot.weight
    assert page is not None
    version = 0 if stored.is_inference() else stored._version
    return view.once(f"weight of {id(stored)}, {version}", lambda: page(view, W))


def leading(layer: nn.Module, site: Site, chosen: Chosen) -> list[tuple[Slot, float]]:
    """The adapters that act on this layer by its weight, up to the first that acts on y."""
    found: list[tuple[Slot, float]] = []
    for name, strength in chosen:
        slot = site.slots.get(name)
        if slot is None or slot.forward is None:
            continue
        if slot.weight is None or not _by_weight(layer, slot):
            break
        found.append((slot, strength))
    return found


def _by_weight(layer: nn.Module, slot: Slot) -> bool:
    """Whether the weight is the form in which the page acts here: of two forms, while gradients are taken, and where
    the weight has values."""
    if hasattr(slot.forward, "follows"):
        return True
    stored = layer._parameters.get(PARAMETER)
    return torch.is_grad_enabled() and not slot.cfg.dropout and stored is not None and not stored.is_meta


def rest(layer: nn.Module, site: Site, chosen: Chosen) -> Chosen:
    """The adapters whose part is still to be done where a weight stood in."""
    done = {slot.name for slot, _ in leading(layer, site, chosen)}
    return tuple((name, strength) for name, strength in chosen if name not in done)


def step_aside(layer: nn.Module) -> bool:
    """The stored weight again; whether this thread had put another one before it."""
    return not torch.compiler.is_compiling() and swap_out(layer)


def _takes(layer: nn.Module, site: Site, stored: Tensor) -> bool:
    if not site.kind.takes_weight or stored.dtype not in EXACT:
        return False
    if not stored.is_meta and torch.is_autocast_enabled(stored.device.type):
        return False
    return "forward" not in layer.__dict__ and site.kind.is_plain(layer)
