"""TinyLoRA: a core between frozen singular vectors that a few numbers span."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import add_lowrank, shrink
from ..ops.svd import balanced_factors
from ._svd import SVDConfig, leading_triplets
from ._svd_core import triplets


@dataclass(frozen=True, kw_only=True)
class TinyLoRAConfig(SVDConfig):
    variant: str = "tinylora"
    r: int = 2
    """Leading singular triplets that are used."""
    u: int = 64
    """Trained numbers of each group of layers."""
    tying: float = 0.0
    """How far layers share them: 0, every layer has its own; 1, one vector for the model; between, groups of
    neighbours."""

    def validate(self) -> None:
        super().validate()
        if self.u < 1 or not 0 <= self.tying <= 1:
            raise ConfigError("TinyLoRAConfig.u must be positive, and tying between 0 and 1.")


@register
class TinyLoRA(Variant):
    """LoRA-XS whose core is a combination of fixed random matrices, with coefficients that layers may share.

    y' = y + s B (Σ_i v_i P_i) A drop(x), A (r, d_in) = √S Vᵀ and B (d_out, r) = U √S from the r largest singular
    triplets of W, P (u, r, r) ~ N(0, 1/r), frozen and saved; v (u) = 0 trained, an exact zero at the start (PEFT: U(±
    0.02)). s = alpha/r, 1 by default. u numbers per group of layers. Morris et al. 2026, Learning to Reason in 13
    Parameters, arXiv 2602.04118.
    r(d_in + d_out) multiply-adds per token.
    """

    name = "tinylora"
    config = TinyLoRAConfig
    paper = "2602.04118"
    family = "shared or random bases"
    needs_weight = True
    lr = 1e-2
    width_growth = -0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: TinyLoRAConfig) -> dict[str, ParamSpec]:
        k = triplets(d_in, d_out, cfg)
        return {
            "lora_A": ParamSpec((k, d_in), init="empty", as_buffer=True),
            "lora_B": ParamSpec((d_out, k), init="empty", as_buffer=True),
            "lora_P": ParamSpec((cfg.u, k, k), init=f"normal:{k**-0.5}", as_buffer=True),
        }

    @staticmethod
    def shared_specs(targets: Any, cfg: TinyLoRAConfig) -> list[tuple[list[Any], dict[str, ParamSpec]]]:
        n = len(targets)
        count = max(1, round(n * (1 - cfg.tying)))
        size = n // count
        starts = [i * size for i in range(count)]
        ends = [*starts[1:], n]
        v = {"lora_v": ParamSpec((cfg.u,), decay=False)}
        return [(list(targets[start:end]), v) for start, end in zip(starts, ends, strict=True)]

    @staticmethod
    def init(layer: Layer[TinyLoRAConfig], cfg: TinyLoRAConfig) -> None:
        layer.lora_A, layer.lora_B = balanced_factors(*leading_triplets(layer, layer.lora_A.shape[0]), 1.0)

    @staticmethod
    def forward(layer: Layer[TinyLoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        R = layer.once("core", lambda: core(layer))
        return add_lowrank(y, shrink(layer.dropout(x), layer.lora_A) @ R.mT, layer.lora_B, layer.cfg.scale)

    @staticmethod
    def factors(layer: Layer[TinyLoRAConfig]) -> tuple[Tensor, Tensor]:
        return layer.lora_A, layer.cfg.scale * layer.lora_B @ core(layer)


def core(layer: Layer[TinyLoRAConfig]) -> Tensor:
    """Σ_i v_i P_i, (r, r)."""
    return (layer.lora_v[:, None, None] * layer.lora_P).sum(0)
