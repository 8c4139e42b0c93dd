"""AdaLoRA: LoRA in the form of a singular value decomposition, whose least important triplets are pruned on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.errors import ConfigError, StateError
from ..core.registry import register
from ..core.spec import ParamSpec
from ..core.variant import Variant
from ..ops.lowrank import add_lowrank


@dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig(AdapterConfig):
    variant: str = "adalora"
    r: int = 12
    """Rank at the start."""
    target_r: int | None = None
    """Mean rank at the end; None means two thirds of the smallest r."""
    tinit: int = 0
    """Optimiser steps before the pruning begins."""
    tfinal: int = 0
    """Optimiser steps at the end during which the chosen triplets stay fixed."""
    delta_t: int = 1
    """Prune every so many steps."""
    beta1: float = 0.85
    """Smoothing of the sensitivity."""
    beta2: float = 0.85
    """Smoothing of the uncertainty."""
    orth_reg: float = 0.1
    """Weight of the penalty that keeps A and B orthonormal; add `ll.penalty(model)` to the loss."""
    done: bool = False
    """The schedule is over and only live triplets are left; written by `ll.save` and `ll.compact`."""

    def validate(self) -> None:
        super().validate()
        if not self.done and not 1 <= self.final_r <= min((self.r, *self.rank_pattern.values())):
            raise ConfigError(
                f"AdaLoRAConfig.target_r must lie between 1 and every rank (r={self.r}), got {self.final_r}."
            )
        if self.tinit < 0 or self.tfinal < 0 or self.delta_t < 1:
            raise ConfigError("AdaLoRAConfig.tinit and tfinal must not be negative, and delta_t must be at least 1.")
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise ConfigError("AdaLoRAConfig.beta1 and beta2 must lie between 0 and 1.")

    @property
    def final_r(self) -> int:
        """The mean rank at the end."""
        return max(1, 2 * min((self.r, *self.rank_pattern.values())) // 3) if self.target_r is None else self.target_r


@register
class AdaLoRA(Variant):
    """Low-rank update in triplets (B_i, E_i, A_i); a budget that shrinks over training is spent on the most important ones.

    y' = y + s ((drop(x) Aᵀ) ∘ E) Bᵀ, A (r, d_in), B (d_out, r) ~ N(0, 0.02²), E (r,) = 0, s = alpha/r for the r of the start throughout
    (PEFT's factor changes when a pruned file is loaded). penalty = γ (‖AAᵀ − I‖² + ‖BᵀB − I‖²), summed over targets.
    After each optimiser step: I = |w ∂w| per entry, Ī ← β₁Ī + (1−β₁)I, Ū ← β₂Ū + (1−β₂)|I − Ī|; a triplet scores Ī∘Ū of E_i plus the
    means over A_i and B_i. The b(t) best triplets of all targets live, the E_i of the others become 0 (and may grow again until the
    next pruning): b(t) = b_T + (b_0 − b_T)(1 − (t−tinit)/(T−tinit−tfinal))³. From T − tfinal on the choice is fixed.
    Ī and Ū are saved, so a resumed run goes on as if uninterrupted; a file saved after step T holds live triplets only.
    Zhang et al. 2023, Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv 2303.10512.
    """

    name = "adalora"
    config = AdaLoRAConfig
    paper = "2303.10512"
    lr = 1e-3
    cost = "r(d_in + d_out)"

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
    def forward(layer, x, y):
        z = (layer.dropout(x) @ layer.lora_A.mT) * (layer.cfg.scale * layer.lora_E)
        return add_lowrank(y, z, layer.lora_B)

    @staticmethod
    def factors(layer):
        return layer.lora_A, layer.lora_B * (layer.cfg.scale * layer.lora_E)

    @staticmethod
    def penalty(layer):
        A, B = layer.tiny("lora_A"), layer.tiny("lora_B")
        eye = torch.eye(layer.cfg.r, dtype=A.dtype, device=A.device)
        return layer.cfg.orth_reg * ((A @ A.mT - eye).square().sum() + (B.mT @ B - eye).square().sum())

    @staticmethod
    def on_step(targets, cfg, step):
        end = targets.total_steps - cfg.tfinal
        views = [v for v in targets if not v.cfg.done]
        if not views:
            return
        if cfg.tinit >= end:
            raise ConfigError(
                f"AdaLoRAConfig: tinit={cfg.tinit} and tfinal={cfg.tfinal} leave no step of total_steps={targets.total_steps} to prune in."
            )
        if step <= end:
            if all(v.master("lora_A").grad is None for v in views):
                raise StateError(
                    "no gradient is left after the optimiser's step; call zero_grad() after step(), not within it."
                )
            scores = [score(v, cfg) for v in views]
            b = budget(step, cfg, end, sum(v.cfg.r for v in views), cfg.final_r * len(views))
            if step > cfg.tinit and (step % cfg.delta_t == 0 or step == end):
                best = torch.cat([s.to(scores[0].device) for s in scores]).argsort(descending=True, stable=True)
                live = torch.zeros_like(best, dtype=torch.bool)
                live[best[:b]] = True
                for view, own in zip(views, live.split([v.cfg.r for v in views]), strict=True):
                    view.master("lora_live").copy_(own)
                    view.master("lora_E").mul_(view.master("lora_live"))
        else:
            for view in views:
                view.master("lora_E").mul_(view.master("lora_live"))

    @staticmethod
    def compact(layer, rank):
        if rank is not None:
            raise ConfigError("AdaLoRA's ranks are its schedule's choice; leave rank out.")
        if layer.cfg.done:
            keep = torch.ones(layer.cfg.r, dtype=torch.bool)
        else:
            keep = layer.master("lora_live").cpu()
        r = int(keep.sum())
        if r == 0:
            return None
        changes = {"r": r, "alpha": layer.cfg.scale * r, "done": True}
        index = keep.nonzero()[:, 0].to(layer.lora_A.device)
        return changes, {"lora_A": layer.lora_A[index], "lora_B": layer.lora_B[:, index], "lora_E": layer.lora_E[index]}


def budget(step: int, cfg: AdaLoRAConfig, end: int, first: int, last: int) -> int:
    """b(t): how many triplets live, over all targets."""
    if step <= cfg.tinit:
        return first
    left = 1 - (step - cfg.tinit) / (end - cfg.tinit)
    return int(last + (first - last) * left**3)


def score(view, cfg: AdaLoRAConfig) -> Tensor:
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
