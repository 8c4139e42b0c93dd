"""Experts as pages see them: one view per expert of a bank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import StateError, TargetError
from ..layers.bank import Bank
from ..model.record import Record
from ..model.site import Site, Slot, tensor_on
from ..model.state import SITE, unwrap
from .composed import composed
from .layer import DenseView, LayerView, StagedView, StillView


def layer_views(model: nn.Module, record: Record) -> list[LayerView]:
    """One view per target of the adapter's own method, at storage precision, not in training."""
    model = unwrap(model)
    found: list[LayerView] = []
    for path, target in record.targets.items():
        if target.cfg.variant != record.cfg.variant:
            continue
        layer = model.get_submodule(path)
        slot: Slot = layer.__dict__[SITE].slots[record.name]
        found.append(StillView(layer, slot, None))
    return found


Chosen = tuple[tuple[str, float], ...]


class ExpertView(DenseView):
    """One expert as a page sees it: its slices of the tensors, and its weight."""

    def __init__(self, bank: Bank, slot: Slot, w: Tensor, b: Tensor | None, tensors: dict[str, Tensor]) -> None:
        super().__init__(bank, slot, w, b)
        self._slices = tensors

    def master(self, name: str) -> Tensor:
        if name not in self._slices:
            raise AttributeError(f"{self.path}: param_specs declares no {name!r}; it declares {sorted(self._slices)}")
        return self._slices[name]

    def once(self, what: str, compute: Any) -> Any:
        return compute()


def init_each(view: StagedView, bank: Bank, init: Any) -> None:
    """Run a page's `init` for every expert, on its slices and a linear layer that shows its weight."""
    for e in range(bank.n_experts):
        layer = nn.Linear(bank.d_in, bank.d_out, bias=False, device="meta")
        layer.weight = nn.Parameter(bank.dense()[e].detach(), requires_grad=False)
        init(StagedView(layer, view._slot, {k: t[e] for k, t in view._staged.items()}), view.cfg)


def try_experts(view: StagedView, bank: Bank) -> None:
    """Raise when the page adds a bias and the experts have none to hold it."""
    if bank.bias is not None or bank.weight.is_meta:
        return
    w = bank.dense()[0].detach().float()
    g = torch.Generator().manual_seed(0)
    tensors = {
        k: (t[0].float() + 0.1 * torch.randn(t[0].shape, generator=g).to(t.device)) if t.is_floating_point() else t[0]
        for k, t in view._staged.items()
    }
    f = composed([(view._slot, 1.0, ExpertView(bank, view._slot, w, None, tensors))], w, None)
    if bool(f(w.new_zeros(1, bank.d_in)).any()):
        raise TargetError(
            f"{view.path}: variant {view.cfg.variant!r} adds a bias, and these experts have none; take 'experts' out "
            "of target_kinds."
        )


def expert_views(view: LayerView) -> Iterator[LayerView]:
    """The view itself, or one per expert of a bank."""
    bank, slot = view._module, view._slot
    if not isinstance(bank, Bank):
        yield view
        return
    for e, w in enumerate(bank.dense()):
        one = ExpertView(bank, slot, w, None, {k: t[e] for k, t in slices(bank, slot).items()})
        one._dtype = view._dtype
        yield one


def slices(bank: Bank, slot: Slot) -> dict[str, Tensor]:
    """Short name -> (E, …) tensor of one adapter.

    Raises:
        StateError: a tensor is gone.
    """
    found = {}
    for short, attribute in slot.keys.items():
        t = tensor_on(bank, attribute)
        if t is None:
            raise StateError(
                f"adapter {slot.name!r}: {slot.path}.{attribute} is gone; detach and load the adapter again."
            )
        found[short] = t
    return found


def adapted(bank: Bank, site: Site, chosen: Chosen) -> tuple[Tensor, Tensor | None]:
    """(W' (E, d_out, d_in), b' (E, d_out) or None) of these adapters with their weights, in the base's dtype, with
    gradients to their tensors."""
    w, b = bank.dense(), bank.bias
    slots = [(site.slots[n], weight) for n, weight in chosen if n in site.slots]
    if all(slot.factors is not None and slot.forward_input is None and not slot.own_weight for slot, _ in slots):
        for slot, weight in slots:
            A, B = torch.vmap(lambda t, w=w, slot=slot: slot.factors(ExpertView(bank, slot, w, None, t)))(
                slices(bank, slot)
            )
            w = torch.baddbmm(w, (weight * B).to(w.dtype), A.to(w.dtype))
        return w, b
    wide = torch.promote_types(w.dtype, torch.float32)
    eye, zero = torch.eye(bank.d_in, dtype=wide, device=w.device), w.new_zeros(1, bank.d_in, dtype=wide)
    new, shifts = [], []
    tensors = [slices(bank, slot) for slot, _ in slots]
    for e in range(bank.n_experts):
        own = [{k: t[e] for k, t in some.items()} for some in tensors]
        f = _function(bank, slots, own, w[e].to(wide), None)  # the bias apart, or W + b − b would round
        new.append((f(eye) - f(zero)).mT.to(w.dtype))
        if b is not None:
            shifts.append(_function(bank, slots, own, w[e].to(wide), b[e].to(wide))(zero)[0].to(b.dtype))
    return torch.stack(new), None if b is None else torch.stack(shifts)


def _function(
    bank: Bank, slots: list[tuple[Slot, float]], tensors: list[dict[str, Tensor]], w: Tensor, b: Tensor | None
) -> Any:
    views = [(slot, k, ExpertView(bank, slot, w, b, own)) for (slot, k), own in zip(slots, tensors, strict=True)]
    return composed(views, w, b)
