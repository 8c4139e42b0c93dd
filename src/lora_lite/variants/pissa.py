"""PiSSA: LoRA that starts from the principal singular triplets of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..core.config import AdapterConfig
from ..core.errors import ConfigError
from ..core.registry import register
from ..ops.spectrum import top_svd
from ..ops.svd import balanced_factors, randomised_svd
from ._deviation import Deviation


@dataclass(frozen=True, kw_only=True)
class PiSSAConfig(AdapterConfig):
    variant: str = "pissa"
    svd: Literal["exact", "randomised"] = "exact"
    """"randomised" takes a fraction of the time on large weights; its factors are as good as stored, whatever their error."""
    niter: int = 4
    """Rounds of subspace iteration of the randomised decomposition."""

    def validate(self) -> None:
        super().validate()
        if self.niter < 0:
            raise ConfigError(f"PiSSAConfig.niter must not be negative, got {self.niter}.")


@register
class PiSSA(Deviation):
    """Low-rank update that starts from the r largest singular triplets of the weight.

    W = U S Vᵀ; A0 = (S_r/s)^½ V_rᵀ (r, d_in), B0 = U_r (S_r/s)^½ (d_out, r); y' = y + s (BA − B0A0) x with A = A0 + ΔA, B = B0 + ΔB.
    The paper and PEFT train A, B and replace W by W − s B0A0, the same function up to that weight's rounding; here W stays as it is and
    the file holds A0, B0, so that no other machine's SVD must agree. Seeded, signs fixed; 2r(d_in + d_out) multiply-adds per token.
    Wants a tenth of LoRA's learning rate.
    Meng et al. 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models, arXiv 2404.02948.
    """

    name = "pissa"
    config = PiSSAConfig
    paper = "2404.02948"
    needs_weight = True
    lr = 1e-4

    @staticmethod
    def init(layer, cfg):
        W = layer.weight
        W = W.to(torch.promote_types(torch.float32, W.dtype))
        if cfg.svd == "exact":
            U, S, V = top_svd(W, cfg.r)
        else:
            U, S, V = randomised_svd(W, cfg.r, cfg.niter, layer.generator("svd"))
        layer.lora_A0, layer.lora_B0 = balanced_factors(U, S, V, cfg.scale)
