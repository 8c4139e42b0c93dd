"""PoLAR: directions on the Stiefel manifold and a free core between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import lowrank_update
from ..ops.stiefel import fill_orthonormal_rows
from ._lowrank import ScaledConfig


@dataclass(frozen=True, kw_only=True)
class PoLARConfig(ScaledConfig):
    variant: str = "polar"
    orthogonality: float = 5e-3
    """λ of the penalty λ/4 (‖XᵀX − I‖² + ‖YᵀY − I‖²), whose gradient is the term λ X(XᵀX − I) of the landing field."""

    def validate(self) -> None:
        super().validate()
        if not (math.isfinite(self.orthogonality) and self.orthogonality >= 0):
            raise ConfigError(f"PoLARConfig.orthogonality must be finite and not negative, got {self.orthogonality}.")


@register
class PoLAR(Variant):
    """Polar-decomposed low-rank update: orthonormal directions on both sides of a trained core.

    y' = y + s ((x Yᵀ) Θᵀ) Xᵀ, Y (r, d_in) with orthonormal rows, X (d_out, r) with orthonormal columns, both drawn at
    random and trained, Θ (r, r) = 0: an exact zero is added at the start. s = alpha/r, or alpha/√r with `use_rslora`.
    r(d_in + d_out) + r² parameters. X and Y are kept near the manifold by the penalty (`ll.penalty`). The authors also
    keep only the part Skew(∇Xᵀ) X of the gradient before the optimiser sees it, which a page cannot do. Lion et al.
    2025, PoLAR: Polar-Decomposed Low-Rank Adapter Representation, arXiv 2506.03133.
    """

    name = "polar"
    config = PoLARConfig
    paper = "2506.03133"
    family = "low rank"
    lr = 4e-3
    width_growth = -0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: PoLARConfig) -> dict[str, ParamSpec]:
        if cfg.r > min(d_in, d_out):
            raise ConfigError(f"rank {cfg.r} is more than a {d_in}->{d_out} weight has; lower r or use rank_pattern.")
        return {
            "lora_X": ParamSpec((d_out, cfg.r), init=lambda t, g: fill_orthonormal_rows(t.mT, g), decay=False),
            "lora_T": ParamSpec((cfg.r, cfg.r)),
            "lora_Y": ParamSpec((cfg.r, d_in), init=fill_orthonormal_rows, decay=False),
        }

    @staticmethod
    def forward(layer: Layer[PoLARConfig], x: Tensor, y: Tensor) -> Tensor:
        B = layer.once("B", lambda: layer.lora_X @ layer.lora_T)
        return lowrank_update(y, layer.dropout(x), layer.lora_Y, B, layer.cfg.scale)

    @staticmethod
    def factors(layer: Layer[PoLARConfig]) -> tuple[Tensor, Tensor]:
        return layer.lora_Y, layer.cfg.scale * layer.lora_X @ layer.lora_T

    @staticmethod
    def penalty(layer: Layer[PoLARConfig]) -> Tensor:
        X, Y = layer.tiny("lora_X"), layer.tiny("lora_Y")
        eye = torch.eye(len(Y), dtype=Y.dtype, device=Y.device)
        return layer.cfg.orthogonality / 4 * ((X.mT @ X - eye).square().sum() + (Y @ Y.mT - eye).square().sum())
