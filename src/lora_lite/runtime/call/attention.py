"""Adapters at the attention: keys and values beside those of the text, and what is added to what the queries found."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...core.errors import SelectionError
from ..layers.attention import Attention
from ..model.call import Call, is_one, is_zero
from ..model.site import Site, Slot
from ..model.state import SITE
from ..view.composed import blend
from ..view.layer import LayerView
from .acting import note_run
from .recompute import selection_of
from .rows import row_groups

Pair = tuple[Tensor, Tensor]
"""Keys and values (B or 1, heads, n, head_dim)."""


class Scores(NamedTuple):
    """What one call of an attention function gets; q, k, v (B, heads, T, head_dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None

    def of(self, index: Tensor) -> Scores:
        """Some rows of the batch."""
        mask = self.mask
        if mask is not None and len(mask) > 1:
            mask = mask.index_select(0, index)
        q, k, v = (t.index_select(0, index) for t in self[:3])
        return Scores(q, k, v, mask)


def nothing(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the module runs: an adapter at its scores has nothing to do."""


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **more: Any
) -> tuple[Tensor, Any]:
    """The attention function of an adapted module, as transformers calls it."""
    site: Site = module.__dict__[SITE]
    kind: Any = site.kind
    _check_sizes(module, site, key, value, more)
    what = Scores(query, key, value, attention_mask)
    if site.awaited:
        note_run(site)
    active, rows, call, extent = selection_of(site)
    if rows is None:
        chosen = [(site.slots[name], weight) for name, weight in active if not is_zero(weight) and name in site.slots]
        return _acted(module, site, chosen, what, call, None, more)
    y, weights = kind.scored(module, *what, **more)
    for group in row_groups(site.state, site.path, site.slots, rows, extent, query):
        chosen = [(site.slots[group.name], 1.0)]
        part, _ = _acted(module, site, chosen, what.of(group.index), call, group.index, more)
        y = y.index_copy(0, group.index, part)
    return y, weights


def _acted(
    module: nn.Module,
    site: Site,
    chosen: list[tuple[Slot, float]],
    what: Scores,
    call: Call | None,
    rows: Tensor | None,
    more: dict[str, Any],
) -> tuple[Tensor, Any]:
    """(y (B, T, heads, head_dim), weights) with these adapters, each with its own weight."""
    kind: Any = site.kind
    extra: list[tuple[Pair, float]] = []
    for slot, weight in chosen:
        pair = _beside(LayerView(module, slot, what.q.dtype, call, rows), slot, kind, site, call, rows)
        if pair is not None:
            extra.append((pair, weight))
    y, weights = _scored(module, kind, what, extra, more)
    for slot, weight in chosen:
        if slot.forward is None:
            continue
        view = LayerView(module, slot, y.dtype, call, rows)
        view.strength = weight
        old = y.flatten(2)
        new = slot.forward(view, what.q.transpose(1, 2).flatten(2), old).to(y.dtype)
        y = (new if slot.own_weight else blend(old, new, weight)).view_as(y)
    return y, weights


def _scored(
    module: nn.Module, kind: Attention, what: Scores, extra: list[tuple[Pair, float]], more: dict[str, Any]
) -> tuple[Tensor, Any]:
    """Attention to the text and `extra` together; a weight w of a pair takes w of the change that it makes after those
    before it."""

    def scored(n: int) -> tuple[Tensor, Any]:
        if not n:
            return kind.scored(module, *what, **more)
        K, V = (
            torch.cat([t.expand(len(what.q), -1, -1, -1) for t in side], 2) for side in zip(*pairs[:n], strict=True)
        )
        k, v, mask = kind.widened(module, *what, (K, V))
        return kind.scored(module, what.q, k, v, mask, **more)

    pairs = [pair for pair, _ in extra]
    if all(is_one(weight) for _, weight in extra):
        return scored(len(pairs))
    before, weights = scored(0)
    y = before
    for i, (_, weight) in enumerate(extra):
        now, weights = scored(i + 1)
        y, before = y + weight * (now - before), now
    return y, weights


def _beside(
    view: LayerView, slot: Slot, kind: Attention, site: Site, call: Call | None, rows: Tensor | None
) -> Pair | None:
    """The keys and values that an adapter has beside those of the text."""
    if slot.prefix is None and slot.tokens is None:
        return None
    if call is None or call.led is None:
        raise SelectionError(
            f"{site.path}: adapter {slot.name!r} stands before the text, which needs a call of the whole model that "
            "carries the adapters, not of a part of it."
        )
    if slot.prefix is not None:
        K, V = slot.prefix(view)
        return kind.split(view._module, K)[None], kind.split(view._module, V)[None]
    if slot.name not in call.led:  # the virtual tokens themselves run
        return None
    if site.state.here.now.grad and not torch.is_grad_enabled():
        raise SelectionError(
            f"{site.path}: adapter {slot.name!r} has virtual tokens, whose keys and values come from outside of this "
            "checkpoint, and one with use_reentrant=True carries no gradient to them. Use use_reentrant=False: "
            'model.gradient_checkpointing_enable({"use_reentrant": False}).'
        )
    K, V = call.led[slot.name][site.path]
    return (K, V) if rows is None or len(K) == 1 else (K.index_select(0, rows), V.index_select(0, rows))


def _check_sizes(module: nn.Module, site: Site, k: Tensor, v: Tensor, more: dict[str, Any]) -> None:
    kind: Any = site.kind
    want = (kind.heads(module)[1], kind.head_dim(module))
    if any((t.shape[1], t.shape[3]) != want for t in (k, v)) or more.get("position_bias") is not None:
        raise SelectionError(
            f"{site.path}: {type(module).__name__} attends with keys {tuple(k.shape)} and values {tuple(v.shape)}, or "
            f"with a bias of its own; adapters at the attention know {want[0]} heads of {want[1]}."
        )
