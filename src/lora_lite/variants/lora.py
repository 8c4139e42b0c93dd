"""LoRA: y' = y + s (x Aᵀ) Bᵀ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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

    y' = y + s (drop(x) Aᵀ) Bᵀ, A (r, d_in), B (d_out, r), s = alpha/r, or alpha/√r with `use_rslora`. A ~ U(±1/√d_in),
    B = 0, so a fresh adapter adds an exact zero. On an embedding, whose x picks single columns of A, they start the
    other way round, A = 0 and B ~ N(0, 1), as PEFT's: a token that training never shows keeps its vector, and a step
    does not shrink with the vocabulary. r(d_in + d_out) parameters. Hu et al. 2021, LoRA: Low-Rank Adaptation of Large
    Language Models, arXiv 2106.09685.
    """

    name = "lora"
    config = LoRAConfig
    paper = "2106.09685"
    family = "low rank"
    also = {
        "rsLoRA": "use_rslora=True",
        "LoRA+": "lr_ratio_B=16",
        "LoftQ": "reference_weights=...",
        "QLoRA": "on a 4-bit base",
        "LoCon": "target_kinds with conv",
    }
    holds = "factors"
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: LoRAConfig) -> dict[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((cfg.r, d_in), init=cfg.init_A),
            "lora_B": ParamSpec((d_out, cfg.r), lr_ratio=cfg.lr_ratio_B),
        }

    @staticmethod
    def init(layer: Layer[LoRAConfig], cfg: LoRAConfig) -> None:
        if layer.by_number and cfg.init_A == "kaiming":
            drawn = torch.randn(layer.lora_B.shape, generator=layer.generator("lora_B"), dtype=torch.float32)
            layer.lora_A, layer.lora_B = torch.zeros_like(layer.lora_A), drawn

    @staticmethod
    def from_factors(layer: Layer[LoRAConfig], A: Tensor, B: Tensor) -> None:
        layer.lora_A, layer.lora_B = A, B / layer.cfg.scale
