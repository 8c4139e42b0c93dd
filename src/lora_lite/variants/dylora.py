"""DyLoRA: LoRA with nested ranks, of which any head can be cut off after training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, StepTargets, Variant, register
from ..ops.lowrank import add_lowrank, shrink


@dataclass(frozen=True, kw_only=True)
class DyLoRAConfig(AdapterConfig):
    variant: str = "dylora"
    r_min: int = 1
    """Smallest rank that is trained."""
    frozen: bool = False
    """Train only the last of the drawn ranks in each step, those before it standing still."""

    def validate(self) -> None:
        super().validate()
        if not 1 <= self.r_min <= min((self.r, *self.rank_pattern.values())):
            raise ConfigError(f"DyLoRAConfig.r_min must lie between 1 and every rank (r={self.r}), got {self.r_min}.")


@register
class DyLoRA(Variant):
    """Low-rank update that is trained at all ranks up to r at once.

    In training y' = y + (alpha/b) (drop(x) A_bᵀ) B_bᵀ, A_b the first b rows of A (r, d_in), B_b the first b columns of
    B (d_out, r); b is r in the first optimiser step, then drawn from {r_min, ..., r} for each, from the seed and the
    step alone, the same for all targets of one rank. In evaluation b = r. `ll.compact(model, rank=b)` cuts the adapter
    to any b. A as in LoRA, B = 0. Same cost as LoRA: ranks beyond b are multiplied by 0, so that nothing is compiled
    anew when b changes. Valipour et al. 2022, DyLoRA: Parameter-Efficient Tuning using Dynamic Search-Free Low-Rank
    Adaptation, arXiv 2210.07558.
    """

    name = "dylora"
    config = DyLoRAConfig
    paper = "2210.07558"
    family = "low rank"
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: DyLoRAConfig) -> dict[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((cfg.r, d_in), init="kaiming"),
            "lora_B": ParamSpec((d_out, cfg.r)),
            "lora_b": ParamSpec((1,), init=f"constant:{cfg.r}", as_buffer=True, dtype=torch.int64, below=cfg.r + 1),
        }

    @staticmethod
    def on_step(targets: StepTargets[DyLoRAConfig], cfg: DyLoRAConfig, step: int) -> None:
        u = float(torch.rand((), generator=targets[0].generator(f"step {step}"), dtype=torch.float64))
        for view in targets:
            low, high = view.cfg.r_min, view.cfg.r
            view.master("lora_b").fill_(low + int(u * (high - low + 1)))

    @staticmethod
    def forward(layer: Layer[DyLoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        A, B = DyLoRA.factors(layer)
        return add_lowrank(y, shrink(layer.dropout(x), A), B)

    @staticmethod
    def factors(layer: Layer[DyLoRAConfig]) -> tuple[Tensor, Tensor]:
        A, B, cfg = layer.lora_A, layer.lora_B, layer.cfg
        if not layer.training:
            return A, B * cfg.scale
        index, b = torch.arange(cfg.r, device=A.device), layer.lora_b
        exact = torch.promote_types(torch.float32, B.dtype)
        scale = torch.where(index < b, cfg.effective_alpha / b.to(exact), 0).to(B.dtype)
        if not cfg.frozen:
            return A, B * scale
        last = index == b - 1
        return torch.where(last[:, None], A, A.detach()), torch.where(last, B, B.detach()) * scale

    @staticmethod
    def compact(layer: Layer[DyLoRAConfig], rank: int | None) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        cfg = layer.cfg
        b = cfg.r if rank is None else rank
        if not 1 <= b <= cfg.r:
            raise ConfigError(f"{layer.path}: rank must lie between 1 and {cfg.r}, got {rank}.")
        changes = {"r": b, "alpha": cfg.effective_alpha, "r_min": min(cfg.r_min, b)}
        return changes, {"lora_A": layer.lora_A[:b], "lora_B": layer.lora_B[:, :b], "lora_b": layer.lora_b.clamp(max=b)}
