"""PSOFT: a rotation, and two vectors of gains, inside the principal subspace of the weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import Layer, ParamSpec, register
from ._svd import SVDConfig
from ._svd_core import SVDCore, basis_specs, rotation_change, rotation_spec, triplets


@dataclass(frozen=True, kw_only=True)
class PSOFTConfig(SVDConfig):
    variant: str = "psoft"
    r: int = 32
    """Dimension of the principal subspace."""


@register
class PSOFT(SVDCore):
    """Orthogonal fine-tuning inside the span of the r largest singular triplets.

    W' = U S diag(1+b) R diag(1+a) Vᵀ + rest, R (r, r) the Cayley rotation of a skew Q; Q, a, b (r,) from zero, r(r−1)/2
    + 2r trained numbers; alpha is not used (it cancels in the published form too). With E = R − I, C − S = S (E ∘
    (1+b)(1+a)ᵀ + diag(a + b + ab)). PEFT recomputes the triplets from the base at load; here the file holds them. One r
    x r solve per call. Wu et al. 2025, Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation, arXiv
    2505.11235.
    """

    name = "psoft"
    config = PSOFTConfig
    paper = "2505.11235"
    family = "rotations and reflections"
    ignores = ("alpha",)
    lr = 1e-3
    width_growth = -0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: PSOFTConfig) -> dict[str, ParamSpec]:
        k = triplets(d_in, d_out, cfg)
        gain = ParamSpec((k,), decay=False)
        return {"lora_a": gain, "lora_b": gain, **rotation_spec(k), **basis_specs(d_in, d_out, cfg)}

    @staticmethod
    def change(layer: Layer[PSOFTConfig]) -> Tensor:
        a, b = layer.tiny("lora_a"), layer.tiny("lora_b")
        core = rotation_change(layer) * (1 + b)[:, None] * (1 + a) + (a + b + a * b).diag()
        return layer.tiny("lora_S")[:, None] * core
