"""Many adapters in one batch without a loop over them. Low rank: one wide masked GEMM, or batched GEMMs over gathered
factors. Feature by feature: one call with gathered vectors. What neither covers is left to the segments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.lowrank import add_lowrank
from ..model.call import RowGroup, Stack
from ..model.site import Site, Slot, tensors_of
from ..view.layer import LayerView

WIDE = 96
"""Up to this sum of ranks every row runs through all adapters and the foreign columns are masked."""


def grouped(
    layer: nn.Module, site: Site, groups: list[RowGroup], x: Tensor, y: Tensor | None
) -> tuple[Tensor, list[RowGroup]]:
    """The new y (the new x where y is None), and the groups that the segments must still do.

    Those are: a method alone in the batch, one that declares neither factors nor vectors, and one with dropout at work.
    Rows without adapter keep their bits.
    """
    value = x if y is None else y
    if len(groups) < 2 or x.shape[0] == 0:
        return value, groups
    together, left = _parted(layer, site, groups, y is None, x.shape[0])
    for kin, kindred in together:
        if kin == LOW_RANK:
            assert y is not None
            value = _low_rank(layer, site, kindred, x, value)
        else:
            value = _by_feature(layer, site, kindred, value, "input" if y is None else "output")
    return value, left


class Kindred:
    """Groups of several adapters that go together."""

    __slots__ = ("groups", "names", "wide")

    def __init__(self, site: Site, groups: list[RowGroup]) -> None:
        self.groups, self.names = groups, tuple(group.name for group in groups)
        self.wide = sum(slot.cfg.r for slot in self.slots(site)) <= WIDE

    def slots(self, site: Site) -> list[Slot]:
        return [site.slots[name] for name in self.names]


Parted = tuple[list[tuple[str, Kindred]], list[RowGroup]]


def _parted(layer: nn.Module, site: Site, groups: list[RowGroup], before: bool, n: int) -> Parted:
    """(kin, groups of several adapters that go together), and the groups that go alone; the same in all calls of one
    `ll.rows` block."""
    keep = not torch.compiler.is_compiling()
    key = ("kin", before, layer.training, n)
    old: Stack | None = site.stacks.get(key) if keep else None
    if old is not None and old.epoch == site.state.row_epoch:
        return old.parts  # type: ignore[return-value]
    alike: dict[str, list[RowGroup]] = {}
    for group in groups:
        alike.setdefault(_kin(site.slots[group.name], layer.training, before), []).append(group)
    left = alike.pop("", []) + [g for some in alike.values() if len(some) < 2 for g in some]
    parted = [(kin, Kindred(site, some)) for kin, some in alike.items() if len(some) > 1], left
    if keep:
        _store(site, key, [], 0, parted)
    return parted


LOW_RANK = "low rank"


def _kin(slot: Slot, training: bool, before: bool) -> str:
    """Groups of one kin go together; "" goes alone."""
    if slot.by_feature is not None:
        return slot.kin
    if before or slot.factors is None or slot.forward_input is not None or (slot.cfg.dropout and training):
        return ""
    return LOW_RANK


def _kept(
    layer: nn.Module, site: Site, kindred: Kindred, key: tuple[Any, ...], build: Callable[[], tuple[Any, ...]]
) -> tuple[Any, ...]:
    """`build()`; without gradients the result serves all calls of one `ll.rows` block and of those after it with the
    same rows, unless a tensor was changed meanwhile."""
    state = site.state
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return build()
    key = (kindred.names, *key)
    old: Stack | None = site.stacks.get(key)
    if old is not None and old.epoch == state.row_epoch and old.versions == sum([t._version for t in old.own]):
        if old.block == state.row_block or _stands(old, kindred.slots(site), layer):
            old.block = state.row_block
            return old.parts
    own = [t for slot in kindred.slots(site) for t in tensors_of(slot, layer)]
    if any(t.is_inference() for t in own):  # these count no versions
        return build()
    versions = sum(t._version for t in own)
    parts = build()
    _store(site, key, own, versions, parts)
    return parts


def _stands(old: Stack, slots: list[Slot], layer: nn.Module) -> bool:
    """Whether the tensors are the same ones, at the same place, which their versions do not tell."""
    own = [t for slot in slots for t in tensors_of(slot, layer)]
    same = len(own) == len(old.own) and all(a is b for a, b in zip(own, old.own, strict=True))
    return same and sum([t.data_ptr() for t in own]) == old.places


def _store(site: Site, key: tuple[Any, ...], own: list[Tensor], versions: int, parts: tuple[Any, ...]) -> None:
    places = sum(t.data_ptr() for t in own)
    site.keep(key, Stack(site.state.row_epoch, own, versions, parts, site.state.row_block, places))


def _low_rank(layer: nn.Module, site: Site, kindred: Kindred, x: Tensor, y: Tensor) -> Tensor:
    """y + x A_iᵀ B_iᵀ with adapter i of each row, an exact zero elsewhere."""

    def build() -> tuple[Any, ...]:
        pairs = [slot.factors(LayerView(layer, slot, y.dtype)) for slot in kindred.slots(site)]  # type: ignore[misc]
        ranks, groups = [A.shape[0] for A, _ in pairs], kindred.groups
        if not kindred.wide:
            return (*_per_row(pairs, ranks, groups), None)
        mask = torch.cat([g.member[:, None].expand(-1, r) for g, r in zip(groups, ranks, strict=True)], 1)
        return torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], 1), mask

    A, B, mask = _kept(layer, site, kindred, (kindred.wide, y.dtype, y.shape[0]), build)
    if mask is not None:  # z = x [A_1; …; A_K]ᵀ, foreign columns set to zero, y + z [B_1 … B_K]ᵀ
        z = torch.where(mask.view(mask.shape[0], *(1,) * (x.dim() - 2), mask.shape[1]), x @ A.mT, 0)
        return add_lowrank(y, z, B)
    if x.dim() == y.dim() == 3:
        return torch.baddbmm(y, torch.bmm(x, A), B)
    z = torch.bmm(x.reshape(x.shape[0], -1, x.shape[-1]), A)
    return torch.baddbmm(y.reshape(y.shape[0], -1, y.shape[-1]), z, B).view(y.shape)


def _per_row(pairs: list[tuple[Tensor, Tensor]], ranks: list[int], groups: list[RowGroup]) -> tuple[Tensor, Tensor]:
    """Aᵀ (n, d_in, r) and Bᵀ (n, r, d_out), padded to one rank and gathered by row; a zero pair serves rows without
    adapter."""
    pad, r = torch.nn.functional.pad, max(ranks)
    A = torch.stack([pad(A, (0, 0, 0, r - A.shape[0])) for A, _ in pairs])
    B = torch.stack([pad(B.mT, (0, 0, 0, r - B.shape[1])) for _, B in pairs])
    which = _which(groups)
    return torch.cat((A, torch.zeros_like(A[:1])))[which].mT, torch.cat((B, torch.zeros_like(B[:1])))[which]


def _by_feature(layer: nn.Module, site: Site, kindred: Kindred, value: Tensor, side: str) -> Tensor:
    """The method's map of every feature with the vectors of each row's adapter."""
    first, groups = site.slots[kindred.names[0]], kindred.groups
    act, vectors = first.act, first.by_feature
    assert act is not None and vectors is not None

    def build() -> tuple[Any, ...]:
        found = [vectors(LayerView(layer, slot, value.dtype), side) for slot in kindred.slots(site)]
        if found[0] is None:  # it acts on the other side
            return (None,)
        which, lead = _which(groups), (-1, *(1,) * (value.dim() - 2))
        columns = [torch.stack(column).to(value.dtype) for column in zip(*found, strict=True)]
        gathered = [torch.cat((c, torch.zeros_like(c[:1])))[which].view(*lead, c.shape[1]) for c in columns]
        return (which.ne(len(groups)).view(*lead, 1), *gathered)

    has, *gathered = _kept(layer, site, kindred, (side, value.dtype, value.shape[:1], value.dim()), build)
    if has is None:
        return value
    return torch.where(has, act(first.cfg, value, *gathered), value)


def _which(groups: list[RowGroup]) -> Tensor:
    """(n,) number of each row's group, len(groups) where it has none."""
    index = torch.full(groups[0].member.shape, len(groups), device=groups[0].member.device)
    for i, group in enumerate(groups):
        index = torch.where(group.member, i, index)
    return index
