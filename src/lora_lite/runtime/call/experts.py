"""Adapters on fused experts (`bank`): while the experts run, their module finds adapted weights in place of the stored
ones.

The stored parameter is not touched: the adapted tensor stands before it as a plain attribute of the module, from the
pre-hook to the post-hook, which runs after an exception too. Methods with `factors` cost two thin products beside each
of the base's (`view/unformed.py`). The weights W'_e of the others are read off the method's page, as merging does: one
dense weight per expert is built in every call and has the base's dtype, so an update that is smaller than half a step
of a bf16 weight is rounded away, as merging would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import SelectionError
from ...ops.orthogonal import full_precision
from ..layers.bank import Bank, banks_in
from ..model.call import Chosen, Extent, Rows
from ..model.site import Site
from ..model.state import SITE
from ..view.expert import adapted
from .acting import note_run
from .recompute import selection_of
from .rows import row_groups
from .turns import swap_in, swap_out


def _owned(owner: nn.Module) -> list[Bank]:
    """The adapted banks of an experts' module."""
    return [bank for bank in banks_in(owner) if SITE in bank.__dict__]


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
    if torch.compiler.is_compiling():
        owner.__dict__.update(new)
    else:
        swap_in(owner, new)


def _step_aside(owner: nn.Module) -> None:
    if not torch.compiler.is_compiling():
        swap_out(owner)
        return
    for bank in _owned(owner):
        owner.__dict__.pop(bank.parameter, None)
        owner.__dict__.pop(f"{bank.parameter}_bias", None)


def experts_pre_hook(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the experts run."""
    _step_aside(owner)  # what an interrupted call has left
    active, rows, *_ = selection_of(_owned(owner)[0].__dict__[SITE])
    if rows is None and active:
        _stand_before(owner, active)


def experts_post_hook(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """After the experts ran, or failed: the stored weights again; then the rows of each adapter, if a batch mixes
    them."""
    _step_aside(owner)
    if output is None:  # an exception is on its way
        return None
    for bank in _owned(owner):
        if bank.__dict__[SITE].awaited:
            note_run(bank.__dict__[SITE])
    site: Site = _owned(owner)[0].__dict__[SITE]
    _, rows, _, extent = selection_of(site)
    return None if rows is None else _by_rows(owner, site, rows, extent, args, kwargs, output)


def _by_rows(
    owner: nn.Module,
    site: Site,
    rows: Rows,
    extent: Extent | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    y: Any,
) -> Tensor:
    """The experts once more for the tokens of each adapter; the other tokens keep what the base gave them."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    if not isinstance(y, Tensor) or any(t.dim() != 2 or t.shape[0] != y.shape[0] for t in (y, *tensors)):
        raise SelectionError(
            f"{site.path}: these experts take or return something else than one row per token, so the rows of several "
            "adapters cannot be told apart. Run one batch per adapter: with ll.active(model, name)."
        )
    names = {n for bank in _owned(owner) for n in bank.__dict__[SITE].slots}
    for group in row_groups(site.state, site.path, names, rows, extent, y):

        def pick(t: Any, index: Tensor = group.index) -> Any:
            return t.index_select(0, index) if isinstance(t, Tensor) else t

        _stand_before(owner, ((group.name, 1.0),))
        try:
            part = owner.forward(*map(pick, args), **{k: pick(v) for k, v in kwargs.items()})
        finally:
            _step_aside(owner)
        y = y.index_copy(0, group.index, part)
    return y
