"""HydraLoRA: one A, several B's, and a router between them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import add_lowrank
from ._lowrank import ScaledConfig


@dataclass(frozen=True, kw_only=True)
class HydraLoRAConfig(ScaledConfig):
    variant: str = "hydralora"
    experts: int = 3
    """Number of B's."""

    def validate(self) -> None:
        super().validate()
        if self.experts < 2:
            raise ConfigError(f"HydraLoRAConfig.experts begins at 2, since one needs no router; got {self.experts}.")


@register
class HydraLoRA(Variant):
    """Asymmetric LoRA: a shared A and E experts B_e, weighed token by token by a router on the layer's input.

    y' = y + s Σ_e p_e B_e A drop(x), p = softmax(R x), R (E, d_in) and A (r, d_in) kaiming, B (E, d_out, r) = 0, s =
    alpha/r. One product with [B_1 … B_E]: no (tokens, E, d_out) is built. r(d_in + E d_out) + E d_in parameters and
    multiply-adds. Tian et al. 2024, HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning, arXiv
    2404.19245.
    """

    name = "hydralora"
    config = HydraLoRAConfig
    paper = "2404.19245"
    family = "mixtures and tasks"
    affine = False
    lr = 2e-4

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: HydraLoRAConfig) -> dict[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((cfg.r, d_in), init="kaiming"),
            "lora_B": ParamSpec((cfg.experts, d_out, cfg.r)),
            "lora_R": ParamSpec((cfg.experts, d_in), init="kaiming"),
        }

    @staticmethod
    def forward(layer: Layer[HydraLoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        p = (x @ layer.lora_R.mT).softmax(-1)
        z = layer.dropout(x) @ layer.lora_A.mT
        mixed = (p[..., None] * z[..., None, :]).flatten(-2)
        return add_lowrank(y, mixed, layer.lora_B.transpose(0, 1).flatten(1), layer.cfg.scale)
