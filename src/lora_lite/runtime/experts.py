"""Adapters on fused experts (`bank`): while the experts run, their module finds adapted weights in place of the stored ones.

W'_e is read off the method's page, as merging does. The stored parameter is not touched: the adapted tensor stands before it as a plain
attribute of the module, from the pre-hook to the post-hook, which runs after an exception too. One dense weight per expert is built in every
call and has the base's dtype: an update that is smaller than half a step of a bf16 weight is rounded away, as merging would.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import AdapterConfig
from ..core.errors import SelectionError, StateError, TargetError
from ..core.registry import get_variant
from ..ops.orthogonal import full_precision
from .bank import Bank
from .fold import fold
from .layer import DenseView, LayerView, StagedView
from .recompute import selection_of
from .rows import row_groups
from .state import SITE, Site, Slot, tensor_on

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


def check_method(path: str, cfg: AdapterConfig) -> None:
    """Refuse what a swapped-in weight cannot be, before anything is attached."""
    variant = get_variant(cfg.variant)
    why = (
        "is not affine in its layer's input"
        if not variant.affine or variant.site == "block"
        else "starts from data"
        if variant.group_init is not None
        else "has a schedule over single matrices"
        if variant.on_step is not None
        else "shares tensors between layers"
        if variant.shared_specs is not None
        else ""
    )
    if why:
        raise TargetError(
            f"{path}: variant {variant.name!r} {why}, so it cannot stand on fused experts; take 'experts' out of target_kinds."
        )
    if cfg.dropout:
        raise TargetError(
            f"{path}: the experts' weight is adapted, not their input, so dropout has nothing to act on; set dropout=0."
        )


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
    f = fold([(view._slot, 1.0, ExpertView(bank, view._slot, w, None, tensors))], w, None)
    if bool(f(w.new_zeros(1, bank.d_in)).any()):
        raise TargetError(
            f"{view.path}: variant {view.cfg.variant!r} adds a bias, and these experts have none; take 'experts' out of target_kinds."
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
    """(W' (E, d_out, d_in), b' (E, d_out) or None) of these adapters with their weights, in the base's dtype, with gradients to their tensors."""
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
    return fold(views, w, b)


def _owned(owner: nn.Module) -> list[Bank]:
    return [m for m in owner._modules.values() if isinstance(m, Bank) and SITE in m.__dict__]


def _stand_before(owner: nn.Module, chosen: Chosen) -> None:
    """Put the adapted weights before the stored ones, all or none."""
    new: dict[str, Tensor] = {}
    for bank in _owned(owner):
        site: Site = bank.__dict__[SITE]
        if any(n in site.slots for n, _ in chosen):
            with full_precision(bank.weight):  # or autocast would hand the experts weights of another dtype than theirs
                w, b = adapted(bank, site, chosen)
            new[bank.parameter] = bank.stored(w)
            if b is not None:
                new[f"{bank.parameter}_bias"] = b
    owner.__dict__.update(new)


def _step_aside(owner: nn.Module) -> None:
    for bank in _owned(owner):
        owner.__dict__.pop(bank.parameter, None)
        owner.__dict__.pop(f"{bank.parameter}_bias", None)


def experts_pre_hook(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the experts run."""
    active, rows, _ = selection_of(_owned(owner)[0].__dict__[SITE].state)
    if rows is None and active:
        _stand_before(owner, active)


def experts_post_hook(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """After the experts ran, or failed: the stored weights again; then the rows of each adapter, if a batch mixes them."""
    _step_aside(owner)
    if output is None:  # an exception is on its way
        return None
    site: Site = _owned(owner)[0].__dict__[SITE]
    _, rows, _ = selection_of(site.state)
    return None if rows is None else _by_rows(owner, site, rows, args, kwargs, output)


def _by_rows(
    owner: nn.Module, site: Site, rows: tuple[str | None, ...], args: tuple[Any, ...], kwargs: dict[str, Any], y: Any
) -> Tensor:
    """The experts once more for the tokens of each adapter; the other tokens keep what the base gave them."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    if not isinstance(y, Tensor) or any(t.dim() != 2 or t.shape[0] != y.shape[0] for t in (y, *tensors)):
        raise SelectionError(
            f"{site.path}: these experts take or return something else than one row per token, so the rows of several adapters cannot be told apart. "
            "Run one batch per adapter: with ll.active(model, name)."
        )
    names = {n for bank in _owned(owner) for n in bank.__dict__[SITE].slots}
    everywhere = Site(site.path, site.kind, site.state)
    everywhere.slots = dict.fromkeys(names)  # type: ignore[assignment]  # only the names are read
    for group in row_groups(everywhere, rows, y):
        pick = lambda t, index=group.index: t.index_select(0, index) if isinstance(t, Tensor) else t  # noqa: E731
        _stand_before(owner, ((group.name, 1.0),))
        try:
            part = owner.forward(*map(pick, args), **{k: pick(v) for k, v in kwargs.items()})
        finally:
            _step_aside(owner)
        y = y.index_copy(0, group.index, part)
    return y
