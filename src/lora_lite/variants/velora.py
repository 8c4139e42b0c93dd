"""VeLoRA: LoRA that keeps one number per group of input features for its backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import add_lowrank, lowrank_update
from ..ops.sketch import sketched_product
from ._lowrank import ScaledConfig


@dataclass(frozen=True, kw_only=True)
class VeLoRAConfig(ScaledConfig):
    variant: str = "velora"
    groups: int = 64
    """Groups of input features, of each of which one number per token is kept; no more than there are features."""
    gradient_scale: float = 1.0
    """Factor of the inputs that are put together again."""

    def validate(self) -> None:
        super().validate()
        if self.groups < 1 or not 1e-6 <= abs(self.gradient_scale) <= 1e6:
            raise ConfigError(f"VeLoRAConfig: groups={self.groups} begins at 1, gradient_scale={self.gradient_scale}.")


@register
class VeLoRA(Variant):
    """LoRA whose A learns from rank-1 sketches of its input, which is all that is kept for the backward pass.

    y' = y + s B A drop(x), and ∂A = gᵀ x̂ with x̂ = Σ_g (x_g·v) v on the groups x_g of the inputs (the last one filled
    up with zeros), v the mean of all groups of the batch, normalised; the gradients of B and of x are exact. `groups`
    numbers per token in place of d_in where the base layer keeps no x itself, as with a quantised one. PEFT's default,
    which takes v anew in every training forward; the authors fix it after the first. Starts, scale and evaluation are
    LoRA's. Miles et al. 2024, VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections, arXiv 2405.17991.
    """

    name = "velora"
    config = VeLoRAConfig
    paper = "2405.17991"
    family = "low rank"
    lr = 2e-4

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: VeLoRAConfig) -> dict[str, ParamSpec]:
        return {"lora_A": ParamSpec((cfg.r, d_in), init="kaiming"), "lora_B": ParamSpec((d_out, cfg.r))}

    @staticmethod
    def factors(layer: Layer[VeLoRAConfig]) -> tuple[Tensor, Tensor]:
        return layer.lora_A, layer.cfg.scale * layer.lora_B

    @staticmethod
    def forward(layer: Layer[VeLoRAConfig], x: Any, y: Tensor) -> Tensor:
        if not (layer.training and isinstance(x, Tensor)):
            return lowrank_update(y, layer.dropout(x), layer.lora_A, layer.lora_B, layer.cfg.scale)
        n = min(layer.cfg.groups, layer.in_features)
        z = sketched_product(layer.dropout(x), layer.lora_A, n, layer.cfg.gradient_scale)
        return add_lowrank(y, z, layer.lora_B, layer.cfg.scale)
