"""SVFT: trained coefficients on the singular vectors of the weight, on the diagonal or in a band around it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, register
from ..core.config import MAX_RANK
from ._svd import SVDConfig
from ._svd_core import SVDCore, basis_specs, triplets


@dataclass(frozen=True, kw_only=True)
class SVFTConfig(SVDConfig):
    variant: str = "svft"
    r: int = MAX_RANK
    """Leading singular triplets that are used; by default all that the weight has, as in the paper."""
    band: int = 0
    """Off-diagonals on either side that are trained, at a tenth of the rate; 0 is the plain form."""

    def validate(self) -> None:
        super().validate()
        if self.band < 0:
            raise ConfigError(f"SVFTConfig.band must not be negative, got {self.band}.")


def lengths(k: int, band: int) -> dict[int, int]:
    """Offset of every trained diagonal of a (k, k) matrix -> its length."""
    return {o: k - abs(o) for o in range(-band, band + 1) if abs(o) < k}


@register
class SVFT(SVDCore):
    """Sparse update in the coordinates of the singular vectors.

    W' = U (S + M) Vᵀ + rest, M (k, k) trained on its diagonal and `band` off-diagonals on either side, zero at the
    start; alpha is not used. k(2 band + 1) − band(band + 1) trained numbers. k triplets cost k(d_in + d_out)
    multiply-adds and as many saved numbers: all of them, as the paper takes, are as many as a square weight has, twice;
    r = 64 is cheap and learns less. The authors' code starts M at random values behind a gate of ½, which departs from
    the base and halves its steps: their rates, 5e-2 plain and 5e-3 in bands, are halved here. Lingam et al. 2024, SVFT:
    Parameter-Efficient Fine-Tuning with Singular Vectors, arXiv 2405.19597.
    """

    name = "svft"
    config = SVFTConfig
    paper = "2405.19597"
    family = "low rank from the weight or from data"
    ignores = ("alpha",)
    lr = 2.5e-2
    width_growth = -0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: SVFTConfig) -> dict[str, ParamSpec]:
        k = triplets(d_in, d_out, cfg)
        M = ParamSpec((sum(lengths(k, cfg.band).values()),), lr_ratio=0.1 if cfg.band else 1.0)
        return {"lora_M": M, **basis_specs(d_in, d_out, cfg)}

    @staticmethod
    def change(layer: Layer[SVFTConfig]) -> Tensor:
        M, sizes = layer.tiny("lora_M"), lengths(layer.lora_S.shape[0], layer.cfg.band)
        if len(sizes) == 1:
            return M
        diagonals = torch.split(M, list(sizes.values()))
        return torch.stack([torch.diag_embed(d, offset) for d, offset in zip(diagonals, sizes, strict=True)]).sum(0)
