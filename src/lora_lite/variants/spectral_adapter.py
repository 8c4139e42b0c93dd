"""Spectral adapter: trained changes of the leading singular vectors of the weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import deviation_factors, lowrank_update
from ._svd import SVDConfig, leading_triplets
from ._svd_core import basis_specs


@dataclass(frozen=True, kw_only=True)
class SpectralAdapterConfig(SVDConfig):
    variant: str = "spectral_adapter"


@register
class SpectralAdapter(Variant):
    """Additive tuning of the r leading singular vectors, on either side.

    W' = (U + ΔU) S (V + ΔV)ᵀ + rest for the r largest triplets of W = U S Vᵀ + rest; ΔU (d_out, r) and ΔV (d_in, r)
    from zero, an exact zero at the start; alpha is not used. It is PiSSA in other units: a step is as long against a
    large singular value as against a small one. Frozen and saved: U, S and V. r(d_in + d_out) parameters, 2r(d_in +
    d_out) multiply-adds. The authors' second form turns U and V by Cayley rotations, which SSVD and PSOFT do. Zhang,
    Pilanci 2024, Spectral Adapter: Fine-Tuning in Spectral Space, arXiv 2405.13952.
    """

    name = "spectral_adapter"
    config = SpectralAdapterConfig
    paper = "2405.13952"
    family = "low rank from the weight or from data"
    ignores = ("alpha",)
    needs_weight = True
    lr = 1e-4
    width_growth = 0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: SpectralAdapterConfig) -> dict[str, ParamSpec]:
        if cfg.r > min(d_in, d_out):
            raise ConfigError(f"rank {cfg.r} is more than a {d_in}->{d_out} weight has; lower r.")
        deltas = {"lora_dU": ParamSpec((d_out, cfg.r)), "lora_dV": ParamSpec((cfg.r, d_in))}
        return {**deltas, **basis_specs(d_in, d_out, cfg)}

    @staticmethod
    def init(layer: Layer[SpectralAdapterConfig], cfg: SpectralAdapterConfig) -> None:
        U, S, V = leading_triplets(layer, cfg.r)
        layer.lora_U, layer.lora_S, layer.lora_V = U, S, V.mT

    @staticmethod
    def forward(layer: Layer[SpectralAdapterConfig], x: Tensor, y: Tensor) -> Tensor:
        return lowrank_update(y, layer.dropout(x), *SpectralAdapter.factors(layer))

    @staticmethod
    def factors(layer: Layer[SpectralAdapterConfig]) -> tuple[Tensor, Tensor]:
        S = layer.lora_S
        A, B = deviation_factors(layer.lora_dV, layer.lora_dU * S, layer.lora_V, layer.lora_U * S)
        return A, B
