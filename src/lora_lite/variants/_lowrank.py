"""Methods whose update is s B A: the rule of their scale, and the page that those share which train A, B or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core import AdapterConfig, Layer, Variant
from ..ops.lowrank import lowrank_update


@dataclass(frozen=True, kw_only=True)
class ScaledConfig(AdapterConfig):
    """`AdapterConfig` with the choice between s = alpha/r and s = alpha/√r."""

    use_rslora: bool = False
    """Scale alpha/√r (rsLoRA, arXiv 2312.03732) instead of alpha/r."""

    @property
    def scale(self) -> float:
        return self.effective_alpha / (self.r**0.5 if self.use_rslora else self.r)


class LowRank(Variant):
    """y' = y + s (drop(x) Aᵀ) Bᵀ with `lora_A` (r, d_in) and `lora_B` (d_out, r); r(d_in + d_out) multiply-adds per
    token. A page says how they start and which of them are trained."""

    @staticmethod
    def forward(layer: Layer[Any], x: Tensor, y: Tensor) -> Tensor:
        return lowrank_update(y, layer.dropout(x), layer.lora_A, layer.lora_B, layer.cfg.scale)

    @staticmethod
    def factors(layer: Layer[Any]) -> tuple[Tensor, Tensor]:
        return layer.lora_A, layer.cfg.scale * layer.lora_B
