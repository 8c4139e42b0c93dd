"""Many low-rank adapters in one batch without a loop over them: one wide masked GEMM, or one batched GEMM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.lowrank import add_lowrank
from .layer import LayerView
from .rows import RowGroup
from .state import Site, Slot, tensor_on

WIDE = 96
"""Up to this sum of ranks (or for a single token) every row runs through all adapters and the wrong columns are masked."""


@dataclass
class Stack:
    """The factors of several adapters of one layer, side by side, kept while their tensors do not change."""

    stamp: tuple[int, ...]
    """Identity and version of every tensor that went in."""
    ranks: list[int]
    A: Tensor
    B: Tensor


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
    tokens = x.numel() // (x.shape[0] * x.shape[-1])
    wide = tokens == 1 or sum(slot.cfg.r for slot in slots) <= WIDE
    stack = _stack(layer, site, slots, wide, y.dtype)
    return _wide(groups, stack, x, y) if wide else _batched(groups, stack, x, y)


def _stack(layer: nn.Module, site: Site, slots: list[Slot], wide: bool, dtype: torch.dtype) -> Stack:
    """Side by side (A (R, d_in), B (d_out, R)) or padded and piled up with a zero pair last (A (K+1, r, d_in), B (K+1, d_out, r)).

    Without gradients the result is kept for the calls of one `ll.rows` block, unless a tensor was changed in place meanwhile.
    """
    keep = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    stamp: tuple[int, ...] = ()
    if keep:
        own = [t for slot in slots for a in slot.keys.values() if (t := tensor_on(layer, a)) is not None]
        keep = not any(t.is_inference() for t in own)
        stamp = (site.state.row_epoch, *(id(t) for t in own), *(t._version for t in own)) if keep else ()
    key = (tuple(slot.name for slot in slots), wide, dtype)
    old = site.stacks.get(key)
    if keep and old is not None and old.stamp == stamp:
        return old
    pairs = [slot.factors(LayerView(layer, slot, dtype)) for slot in slots]  # type: ignore[misc]
    ranks = [A.shape[0] for A, _ in pairs]
    if wide:
        new = Stack(stamp, ranks, torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], 1))
    else:
        pad, r = torch.nn.functional.pad, max(ranks)
        As = [pad(A, (0, 0, 0, r - A.shape[0])) for A, _ in pairs]
        Bs = [pad(B, (0, r - B.shape[1])) for _, B in pairs]
        new = Stack(
            stamp, ranks, torch.stack([*As, torch.zeros_like(As[0])]), torch.stack([*Bs, torch.zeros_like(Bs[0])])
        )
    if keep:
        if len(site.stacks) > 3:
            site.stacks.clear()
        site.stacks[key] = new
    return new


def _wide(groups: list[RowGroup], stack: Stack, x: Tensor, y: Tensor) -> Tensor:
    """z = x [A_1; …; A_K]ᵀ, foreign columns set to zero, y + z [B_1 … B_K]ᵀ."""
    member = torch.stack([g.member for g in groups], 1)
    mask = member.repeat_interleave(torch.tensor(stack.ranks, device=x.device), 1, output_size=sum(stack.ranks))
    z = torch.where(mask.view(mask.shape[0], *(1,) * (x.dim() - 2), mask.shape[1]), x @ stack.A.mT, 0)
    return add_lowrank(y, z, stack.B)


def _batched(groups: list[RowGroup], stack: Stack, x: Tensor, y: Tensor) -> Tensor:
    """Gather each row's factors for two batched GEMMs; the last, zero pair serves rows without adapter."""
    index = torch.full((x.shape[0],), len(groups), device=x.device)
    for i, group in enumerate(groups):
        index = torch.where(group.member, i, index)
    z = torch.bmm(x.reshape(x.shape[0], -1, x.shape[-1]), stack.A[index].mT)
    return torch.baddbmm(y.reshape(y.shape[0], -1, y.shape[-1]), z, stack.B[index].mT).view(y.shape)
