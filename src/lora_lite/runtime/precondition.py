"""Riemannian preconditioning of low-rank factors, for any optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .._torch import within_step
from ..core.arguments import checked
from ..core.errors import StateError
from .model.state import record_of, state_of
from .schedule import torch_optimizer
from .view.expert import layer_views
from .view.layer import LayerView

A, B = "lora_A", "lora_B"
"""The factors of an update BA, by the name that every low-rank method gives them; `lora_A0` is a frozen start beside
its deviation."""


@checked
def precondition(model: nn.Module, optimizer: Optimizer, reg: float = 1e-6, name: str | None = None) -> RemovableHandle:
    """Before each step of `optimizer`: ∂A ← (BᵀB + δI)⁻¹ ∂A and ∂B ← ∂B (AAᵀ + δI)⁻¹, with A (r, d_in), B (d_out, r).

    The step of BA then no longer depends on how the update is split between A and B, so both learn at one rate and
    large ranks stay stable. Zhang and Pilanci 2024, Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models,
    arXiv 2402.02347.

    Args:
        reg: δ, which keeps the inverse finite while B is zero.
        name: one adapter; None means all whose method has trained factors lora_A and lora_B.

    Returns:
        A handle; its `remove()` ends the preconditioning.

    Raises:
        StateError: no adapter has such factors, or reg is not positive.
    """
    if not reg > 0:
        raise StateError(f"reg must be positive, got {reg}.")
    state = state_of(model)
    records = [record_of(model, name)] if name is not None else list(state.records.values())
    able = [r for r in records if any(_is_pair(r.targets[p].specs) for p in r.targets)]
    if not able:
        raise StateError(
            f"{', '.join(repr(r.name) for r in records)}: no target has trained factors lora_A (r, d_in) and lora_B "
            "(d_out, r) to precondition."
        )

    def before_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if within_step(optimizer):
            return
        with torch.no_grad():
            for record in able:
                if state.records.get(record.name) is record and record.trainable:
                    for view in layer_views(model, record):
                        _precondition(view, reg)

    return torch_optimizer(optimizer).register_step_pre_hook(before_step)


def _is_pair(specs: dict[str, Any]) -> bool:
    if not all(k in specs and specs[k].is_trained and len(specs[k].shape) == 2 for k in (A, B)):
        return False
    return specs[A].shape[0] == specs[B].shape[1]


def _precondition(view: LayerView, reg: float) -> None:
    a, b = view.master(A), view.master(B)
    wa, wb = with_start(view, A), with_start(view, B)
    eye = reg * torch.eye(wa.shape[0], dtype=wa.dtype, device=wa.device)
    if a.grad is not None:
        a.grad.copy_(torch.linalg.solve(wb.mT @ wb + eye, a.grad.to(wa.dtype)))
    if b.grad is not None:
        b.grad.copy_(torch.linalg.solve(wa @ wa.mT + eye, b.grad.to(wa.dtype), left=False))


def with_start(view: LayerView, short: str) -> Tensor:
    """A factor with its frozen start added, in fp32 or better."""
    return view.tiny(short) + view.tiny(f"{short}0") if f"{short}0" in view._slot.keys else view.tiny(short)
