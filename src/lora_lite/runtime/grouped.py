"""Many low-rank adapters in one batch without a loop over them: one wide masked GEMM, or batched GEMMs over gathered factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.lowrank import add_lowrank
from .layer import LayerView
from .rows import RowGroup
from .state import Site, Slot, tensor_on

WIDE = 96
"""Up to this sum of ranks every row runs through all adapters and the foreign columns are masked."""


@dataclass
class Stack:
    """The factors of several adapters of one layer, kept while their tensors do not change."""

    epoch: int
    own: list[Tensor]
    """The stored tensors that went in, and"""
    versions: int
    """the sum of their versions."""
    mask: Tensor | None
    """Wide: (n, R), True where a row may see a column."""
    A: Tensor
    """Wide: (R, d_in). Batched: one (r, d_in) per row."""
    B: Tensor
    """Wide: (d_out, R). Batched: one (r, d_out) per row."""


def grouped(layer: nn.Module, site: Site, groups: list[RowGroup], x: Tensor, y: Tensor) -> Tensor | None:
    """y + x A_iᵀ B_iᵀ with adapter i of each row, or None where the segment path must do it.

    That is: a single adapter, a method that declares no factors, or dropout at work. Rows without adapter get an exact zero.
    """
    if len(groups) < 2 or x.shape[0] == 0:
        return None
    slots = [site.slots[group.name] for group in groups]
    for slot in slots:
        if slot.factors is None or slot.forward_input is not None or (slot.cfg.dropout and layer.training):
            return None
    wide = sum(slot.cfg.r for slot in slots) <= WIDE
    stack = _stack(layer, site, slots, groups, wide, y.dtype)
    if wide:
        return _wide(stack, x, y)
    z = torch.bmm(x.reshape(x.shape[0], -1, x.shape[-1]), stack.A.mT)
    return torch.baddbmm(y.reshape(y.shape[0], -1, y.shape[-1]), z, stack.B).view(y.shape)


def _stack(
    layer: nn.Module, site: Site, slots: list[Slot], groups: list[RowGroup], wide: bool, dtype: torch.dtype
) -> Stack:
    """The factors as `Stack` describes them. Without gradients the result serves all calls of one `ll.rows` block, unless a
    tensor was changed in place meanwhile."""
    state = site.state
    keep = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    key = (tuple(slot.name for slot in slots), wide, dtype, groups[0].member.shape[0])
    old: Stack | None = site.stacks.get(key) if keep else None
    if old is not None and old.epoch == state.row_epoch and old.versions == sum(t._version for t in old.own):
        return old
    own: list[Tensor] = []
    if keep:
        own = [t for slot in slots for a in slot.keys.values() if (t := tensor_on(layer, a)) is not None]
        keep = not any(t.is_inference() for t in own)  # inference tensors count no versions
    versions = sum(t._version for t in own) if keep else 0
    pairs = [slot.factors(LayerView(layer, slot, dtype)) for slot in slots]  # type: ignore[misc]
    ranks = [A.shape[0] for A, _ in pairs]
    mask = None
    if wide:
        A, B = torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], 1)
        mask = torch.cat([g.member[:, None].expand(-1, r) for g, r in zip(groups, ranks, strict=True)], 1)
    else:
        A, B = _per_row(pairs, ranks, groups)
    new = Stack(state.row_epoch, own, versions, mask, A, B)
    if keep:
        if len(site.stacks) > 1:
            site.stacks.clear()
        site.stacks[key] = new
    return new


def _per_row(pairs: list[tuple[Tensor, Tensor]], ranks: list[int], groups: list[RowGroup]) -> tuple[Tensor, Tensor]:
    """Padded to one rank and gathered by row; a zero pair serves rows without adapter."""
    pad, r = torch.nn.functional.pad, max(ranks)
    A = torch.stack([pad(A, (0, 0, 0, r - A.shape[0])) for A, _ in pairs])
    B = torch.stack([pad(B.mT, (0, 0, 0, r - B.shape[1])) for _, B in pairs])
    index = torch.full(groups[0].member.shape, len(groups), device=A.device)
    for i, group in enumerate(groups):
        index = torch.where(group.member, i, index)
    return torch.cat((A, torch.zeros_like(A[:1])))[index], torch.cat((B, torch.zeros_like(B[:1])))[index]


def _wide(stack: Stack, x: Tensor, y: Tensor) -> Tensor:
    """z = x [A_1; …; A_K]ᵀ, foreign columns set to zero, y + z [B_1 … B_K]ᵀ."""
    mask = stack.mask
    assert mask is not None
    z = torch.where(mask.view(mask.shape[0], *(1,) * (x.dim() - 2), mask.shape[1]), x @ stack.A.mT, 0)
    return add_lowrank(y, z, stack.B)
