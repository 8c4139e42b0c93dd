"""AdaLoRA: LoRA in the form of a singular value decomposition, whose least important triplets are pruned on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, StateError, StepTargets, Variant, register
from ..ops.linalg import norm
from ..ops.lowrank import add_lowrank, shrink
from ._budget import BudgetConfig, best, budget


@dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig(BudgetConfig):
    variant: str = "adalora"
    beta1: float = 0.85
    """Smoothing of the sensitivity."""
    beta2: float = 0.85
    """Smoothing of the uncertainty."""
    orth_reg: float = 0.1
    """γ, the weight of the penalty that keeps A and B orthonormal; add `ll.penalty(model)` to the loss."""

    def validate(self) -> None:
        super().validate()
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise ConfigError("AdaLoRAConfig.beta1 and beta2 must lie between 0 and 1.")


@register
class AdaLoRA(Variant):
    """Low-rank update in triplets (B_i, E_i, A_i); a budget that shrinks over training is spent on the most important
    ones.

    y' = y + s ((drop(x) Aᵀ) ∘ E) Bᵀ, A (r, d_in), B (d_out, r) ~ N(0, 0.02²), E (r,) = 0, s = alpha/r for the r of the
    start throughout (PEFT's factor changes when a pruned file is loaded). penalty = γ times the mean of ‖AAᵀ − I‖ and
    ‖BᵀB − I‖ over all targets, as in the authors' code, for which their γ is meant: it does not grow with the number of
    targets (the text sums squares). After each optimiser step: I = |w ∂w| per entry, Ī ← β₁Ī + (1−β₁)I, Ū ← β₂Ū +
    (1−β₂)|I − Ī|; a triplet scores Ī∘Ū of E_i plus the means over A_i and B_i. The b(t) best triplets of all targets
    live, the E_i of the others become 0 (and may grow again until the next pruning): b(t) = b_T + (b_0 − b_T)(1 −
    (t−tinit)/(T−tinit−tfinal))³. From T − tfinal on the choice is fixed. Ī and Ū are saved, so a resumed run goes on as
    if uninterrupted; a file saved after step T holds live triplets only. Zhang et al. 2023, Adaptive Budget Allocation
    for Parameter-Efficient Fine-Tuning, arXiv 2303.10512.
    """

    name = "adalora"
    config = AdaLoRAConfig
    paper = "2303.10512"
    family = "low rank"
    lr = 1e-3
    width_growth = 0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: AdaLoRAConfig) -> dict[str, ParamSpec]:
        shapes = {"A": (cfg.r, d_in), "B": (d_out, cfg.r), "E": (cfg.r,)}
        specs = {
            f"lora_{k}": ParamSpec(shape, init="zeros" if k == "E" else "normal:0.02", decay=k != "E")
            for k, shape in shapes.items()
        }
        if not cfg.done:
            exact = torch.promote_types(torch.float32, cfg.torch_dtype)
            for k, shape in shapes.items():
                for kind in ("sensitivity", "uncertainty"):
                    specs[f"lora_{kind}_{k}"] = ParamSpec(shape, as_buffer=True, dtype=exact)
            specs["lora_live"] = ParamSpec((cfg.r,), init="ones", as_buffer=True, dtype=torch.bool)
        return specs

    @staticmethod
    def forward(layer: Layer[AdaLoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        z = shrink(layer.dropout(x), layer.lora_A) * (layer.cfg.scale * layer.lora_E)
        return add_lowrank(y, z, layer.lora_B)

    @staticmethod
    def factors(layer: Layer[AdaLoRAConfig]) -> tuple[Tensor, Tensor]:
        return layer.lora_A, layer.lora_B * (layer.cfg.scale * layer.lora_E)

    @staticmethod
    def penalty(layer: Layer[AdaLoRAConfig]) -> Tensor:
        A, B = layer.tiny("lora_A"), layer.tiny("lora_B")
        eye = torch.eye(layer.cfg.r, dtype=A.dtype, device=A.device)
        return layer.cfg.orth_reg * (norm(A @ A.mT - eye) + norm(B.mT @ B - eye)) / (2 * layer.peers)

    @staticmethod
    def on_step(targets: StepTargets[AdaLoRAConfig], cfg: AdaLoRAConfig, step: int) -> None:
        views = [v for v in targets if not v.cfg.done]
        if not views:
            return
        end = cfg.last_pruning(targets.total_steps)
        if step <= end:
            if all(v.master("lora_A").grad is None for v in views):
                raise StateError(
                    "no gradient is left after the optimiser's step; call zero_grad() after step(), not within it."
                )
            scores = [score(v, cfg) for v in views]
            if cfg.prunes_at(step, end):
                b = budget(step, cfg, end, sum(v.cfg.r for v in views), cfg.final_r * len(views))
                for view, live in zip(views, best(scores, b), strict=True):
                    view.master("lora_live").copy_(live)
        if step > end or cfg.prunes_at(step, end):
            for view in views:
                view.master("lora_E").mul_(view.master("lora_live"))

    @staticmethod
    def compact(layer: Layer[AdaLoRAConfig], rank: int | None) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        if rank is not None:
            raise ConfigError("AdaLoRA's ranks are its schedule's choice; leave rank out.")
        keep = torch.ones(layer.cfg.r, dtype=torch.bool) if layer.cfg.done else layer.master("lora_live").cpu()
        r = int(keep.sum())
        if r == 0:
            return None
        changes = {"r": r, "alpha": layer.cfg.scale * r, "done": True}
        index = keep.nonzero()[:, 0].to(layer.lora_A.device)
        return changes, {"lora_A": layer.lora_A[index], "lora_B": layer.lora_B[:, index], "lora_E": layer.lora_E[index]}


def score(view: Layer[AdaLoRAConfig], cfg: AdaLoRAConfig) -> Tensor:
    """Move Ī and Ū of one target by one step; the importance (r,) of its triplets."""
    total = torch.zeros((), device=view.lora_A.device)
    for k, rest in (("A", 1), ("B", 0), ("E", None)):
        w = view.master(f"lora_{k}")
        smooth, spread = view.master(f"lora_sensitivity_{k}"), view.master(f"lora_uncertainty_{k}")
        now = torch.zeros_like(smooth) if w.grad is None else (w * w.grad).abs().to(smooth.dtype)
        smooth.lerp_(now, 1 - cfg.beta1)
        spread.lerp_((now - smooth).abs(), 1 - cfg.beta2)
        importance = smooth * spread
        total = total + (importance if rest is None else importance.mean(rest))
    return total
