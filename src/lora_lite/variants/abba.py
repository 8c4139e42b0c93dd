"""ABBA: a low-rank product that starts from the weight, times another one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core import ConfigError, Layer, ParamSpec, register
from ..ops.svd import balanced_factors
from ._hadamard import Hadamard
from ._svd import SVDConfig, leading_triplets


@dataclass(frozen=True, kw_only=True)
class ABBAConfig(SVDConfig):
    variant: str = "abba"

    @property
    def scale(self) -> float:
        """s = alpha, whatever the rank."""
        return self.effective_alpha


@register
class ABBA(Hadamard):
    """Elementwise product of two low-rank updates, the first of which starts as the weight's largest part.

    y' = y + s ((B1 A1) ∘ (B2 A2)) x, A1, A2 (r, d_in), B1, B2 (d_out, r), all trained. W = U S Vᵀ: B1 = U √S and A1 =
    √S Vᵀ of the r largest triplets, A2 ~ U(±√(6/d_in)), B2 = 0: an exact zero is added at the start. 2r(d_in + d_out)
    parameters: r is half of the rank with which the paper compares. s = alpha, r unless given: the authors' code, with
    one alpha for both pairs; the paper writes alpha²/r. Computed as a low-rank update of rank r² while that is cheaper
    than the dense matrix. Singhal et al. 2025, ABBA: Highly Expressive Hadamard Product Adaptation for Large Language
    Models, arXiv 2505.14238.
    """

    name = "abba"
    config = ABBAConfig
    paper = "2505.14238"
    family = "products"
    needs_weight = True
    lr = 1e-3
    width_growth = -1.0

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: ABBAConfig) -> dict[str, ParamSpec]:
        if cfg.r > min(d_in, d_out):
            raise ConfigError(f"rank {cfg.r} is more than a {d_in}->{d_out} weight has; lower r or use rank_pattern.")
        bound = math.sqrt(6 / d_in)
        return {
            "lora_A1": ParamSpec((cfg.r, d_in), init="empty", decay=False),
            "lora_B1": ParamSpec((d_out, cfg.r), init="empty", decay=False),
            "lora_A2": ParamSpec((cfg.r, d_in), init=lambda t, g: t.uniform_(-bound, bound, generator=g), decay=False),
            "lora_B2": ParamSpec((d_out, cfg.r), decay=False),
        }

    @staticmethod
    def init(layer: Layer[ABBAConfig], cfg: ABBAConfig) -> None:
        layer.lora_A1, layer.lora_B1 = balanced_factors(*leading_triplets(layer, cfg.r), 1.0)
