"""LoRA-XS: a trained r x r matrix between the frozen leading singular vectors of the weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import Layer, ParamSpec, register
from ._svd import SVDConfig
from ._svd_core import SVDCore, basis_specs, triplets


@dataclass(frozen=True, kw_only=True)
class LoRAXSConfig(SVDConfig):
    variant: str = "lora_xs"


@register
class LoRAXS(SVDCore):
    """Low-rank update with r² trained numbers per layer.

    W ≈ U S Vᵀ, U (d_out, r), V (d_in, r); y' = y + s U R S Vᵀ x, R (r, r) = 0 trained, s = alpha/r. ΔW stays in span U
    x span V. The authors draw R from N(0, 1e-5²); zero has the same gradients and is the exact base. r(d_in + d_out) +
    r² multiply-adds. Bałazy et al. 2024, LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters, arXiv
    2405.17604.
    """

    name = "lora_xs"
    config = LoRAXSConfig
    paper = "2405.17604"
    family = "low rank from the weight or from data"
    lr = 4e-3
    width_growth = -0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: LoRAXSConfig) -> dict[str, ParamSpec]:
        k = triplets(d_in, d_out, cfg)
        return {"lora_R": ParamSpec((k, k)), **basis_specs(d_in, d_out, cfg)}

    @staticmethod
    def change(layer: Layer[LoRAXSConfig]) -> Tensor:
        return layer.cfg.scale * layer.tiny("lora_R") * layer.tiny("lora_S")
