"""SSVD: trained singular values and a rotation of the input-side singular vectors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import Layer, ParamSpec, register
from ._svd import SVDConfig
from ._svd_core import SVDCore, basis_specs, rotation_change, rotation_spec, triplets


@dataclass(frozen=True, kw_only=True)
class SSVDConfig(SVDConfig):
    variant: str = "ssvd"
    r: int = 256
    """Leading singular triplets that take part: a quarter of a width of 1,024; a weight with fewer gives all it has."""


@register
class SSVD(SVDCore):
    """Structured update of the leading singular triplets: what the layer writes stays, what it reads rotates.

    W' = U (S + ΔS) G Vᵀ + rest, G (r, r) the Cayley rotation of a skew Q, ΔS (r,) and Q from zero, r(r+1)/2 trained
    numbers; alpha is not used. C − S = (S + ΔS) E + ΔS with E = G − I. G is orthogonal for any Q, so the part's
    singular values are exactly |S + ΔS|; the authors' default I − 2Q is only to first order, and their gate of ½
    departs from the base. Their smallest setting takes 25 % of the triplets. Where d_out < d_in their code decomposes
    the transpose and rotates what the layer writes; here it is always what it reads, as in the text. One r x r solve
    per call. Wang et al. 2025, SSVD: Structured SVD for Parameter-Efficient
    Fine-Tuning and Benchmarking under Domain Shift in ASR, arXiv 2509.02830.
    """

    name = "ssvd"
    config = SSVDConfig
    paper = "2509.02830"
    family = "low rank from the weight or from data"
    ignores = ("alpha",)
    lr = 1e-3
    width_growth = -0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: SSVDConfig) -> dict[str, ParamSpec]:
        k = triplets(d_in, d_out, cfg)
        return {"lora_dS": ParamSpec((k,), decay=False), **rotation_spec(k), **basis_specs(d_in, d_out, cfg)}

    @staticmethod
    def change(layer: Layer[SSVDConfig]) -> Tensor:
        dS = layer.tiny("lora_dS")
        return (layer.tiny("lora_S") + dS)[:, None] * rotation_change(layer) + dS.diag()
