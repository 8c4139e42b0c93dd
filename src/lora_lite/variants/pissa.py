"""PiSSA: LoRA that starts from the principal singular triplets of the weight."""

from __future__ import annotations

from dataclasses import dataclass

from ..core import Layer, register
from ..ops.svd import balanced_factors
from ._deviation import Deviation
from ._svd import SVDConfig, leading_triplets


@dataclass(frozen=True, kw_only=True)
class PiSSAConfig(SVDConfig):
    variant: str = "pissa"


@register
class PiSSA(Deviation):
    """Low-rank update that starts from the r largest singular triplets of the weight.

    W = U S Vᵀ; A0 = (S_r/s)^½ V_rᵀ (r, d_in), B0 = U_r (S_r/s)^½ (d_out, r); y' = y + s (BA − B0A0) x with A = A0 + ΔA,
    B = B0 + ΔB. The paper and PEFT train A, B and replace W by W − s B0A0, the same function up to that weight's
    rounding; here W stays as it is and the file holds A0, B0, so that no other machine's SVD must agree. Seeded, signs
    fixed; 2r(d_in + d_out) multiply-adds per token. Wants a tenth of LoRA's learning rate; the authors train it, and
    LoRA, at 2e-5. Meng et al. 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
    Models, arXiv 2404.02948.
    """

    name = "pissa"
    config = PiSSAConfig
    paper = "2404.02948"
    family = "low rank from the weight or from data"
    needs_weight = True
    lr = 1e-4
    width_growth = 0.5

    @staticmethod
    def init(layer: Layer[PiSSAConfig], cfg: PiSSAConfig) -> None:
        layer.lora_A0, layer.lora_B0 = balanced_factors(*leading_triplets(layer, cfg.r), cfg.scale)
