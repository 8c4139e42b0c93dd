"""MoSLoRA: LoRA with a trained mixer between its factors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import Layer, ParamSpec, Variant, register
from ..ops.lowrank import lowrank_update
from ._lowrank import ScaledConfig


@dataclass(frozen=True, kw_only=True)
class MoSLoRAConfig(ScaledConfig):
    variant: str = "moslora"


@register
class MoSLoRA(Variant):
    """Mixture of subspaces: a trained r x r matrix mixes the ranks of a low-rank update.

    y' = y + s (x Aᵀ) Mᵀ Bᵀ, A (r, d_in) ~ U(±1/√d_in), M (r, r) ~ U(±1/√r), B (d_out, r) = 0: an exact zero is added at
    the start. s = alpha/r, or alpha/√r with `use_rslora`. r(d_in + d_out) + r² parameters; M is multiplied into B. The
    paper also starts M as an orthogonal matrix; the authors' code draws it as here. Wu et al. 2024, Mixture-of-
    Subspaces in Low-Rank Adaptation, arXiv 2406.11909.
    """

    name = "moslora"
    config = MoSLoRAConfig
    paper = "2406.11909"
    family = "low rank"
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: MoSLoRAConfig) -> dict[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((cfg.r, d_in), init="kaiming"),
            "lora_M": ParamSpec((cfg.r, cfg.r), init="kaiming"),
            "lora_B": ParamSpec((d_out, cfg.r)),
        }

    @staticmethod
    def forward(layer: Layer[MoSLoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        B = layer.once("B", lambda: layer.lora_B @ layer.lora_M)
        return lowrank_update(y, layer.dropout(x), layer.lora_A, B, layer.cfg.scale)

    @staticmethod
    def factors(layer: Layer[MoSLoRAConfig]) -> tuple[Tensor, Tensor]:
        return layer.lora_A, layer.cfg.scale * layer.lora_B @ layer.lora_M
