"""LoRA: y' = y + s (x Aᵀ) Bᵀ."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import Layer, ParamSpec, register
from ._lowrank import LowRank, ScaledConfig


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(ScaledConfig):
    variant: str = "lora"
    lr_ratio_B: float = 1.0
    """Learning rate of B over that of A in `param_groups` (LoRA+, arXiv 2402.12354; 16 is typical)."""
    init_A: str = "kaiming"
    """Start of A, see ParamSpec."""


@register
class LoRA(LowRank):
    """Low-rank update of a frozen weight.

    y' = y + s (drop(x) Aᵀ) Bᵀ, A (r, d_in), B (d_out, r), s = alpha/r, or alpha/√r with `use_rslora`.
    A ~ U(±1/√d_in), B = 0, so a fresh adapter adds an exact zero. r(d_in + d_out) parameters.
    Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685.
    """

    name = "lora"
    config = LoRAConfig
    paper = "2106.09685"
    holds = "factors"
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: LoRAConfig) -> dict[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((cfg.r, d_in), init=cfg.init_A),
            "lora_B": ParamSpec((d_out, cfg.r), lr_ratio=cfg.lr_ratio_B),
        }

    @staticmethod
    def from_factors(layer: Layer[LoRAConfig], A: Tensor, B: Tensor) -> None:
        layer.lora_A, layer.lora_B = A, B / layer.cfg.scale
