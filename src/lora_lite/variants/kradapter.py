"""KRAdapter: an update whose rows or columns are small Kronecker products."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..core import AdapterConfig, Layer, ParamSpec, Variant, register


@dataclass(frozen=True, kw_only=True)
class KRAdapterConfig(AdapterConfig):
    variant: str = "kradapter"
    strength: float = 2.0
    """s, as in the authors' code; alpha and r are not used."""

    @property
    def scale(self) -> float:
        """s."""
        return self.strength


@register
class KRAdapter(Variant):
    """Khatri-Rao product: an update of full rank from 2 d √d numbers.

    Let d be the smaller width of the layer and D the larger. Row i of a (d, D) matrix is v_i ⊗ u_i cut to D entries, U
    (d, q) = 0, V (d, p) ~ U(±√(6/26p)), q = ⌊√d⌋, p = ⌈D/q⌉ but at least q; y' = y + s Δ x with Δ that matrix or its
    transpose, s = 2. An exact zero is added at the start. d(p + q) parameters, no rank to choose. The product has full
    rank as a rule, so it is built in every call. d_in d_out multiply-adds per token. Albert et al. 2025, Towards Higher
    Effective Rank in Parameter-efficient Fine-tuning using Khatri-Rao Product, arXiv 2508.00230.
    """

    name = "kradapter"
    config = KRAdapterConfig
    paper = "2508.00230"
    family = "products"
    ignores = ("r", "alpha")
    lr = 1e-3
    width_growth = 0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: KRAdapterConfig) -> dict[str, ParamSpec]:
        d, D = sorted((d_in, d_out))
        q = math.isqrt(d)
        p = max(q, -(-D // q))
        bound = math.sqrt(6 / (26 * p))
        return {
            "lora_U": ParamSpec((d, q)),
            "lora_V": ParamSpec((d, p), init=lambda t, g: t.uniform_(-bound, bound, generator=g)),
        }

    @staticmethod
    def forward(layer: Layer[KRAdapterConfig], x: Tensor, y: Tensor) -> Tensor:
        change = layer.once("change", lambda: khatri_rao(layer))
        return y + layer.dropout(x) @ change


def khatri_rao(layer: Layer[KRAdapterConfig]) -> Tensor:
    """s Δᵀ (d_in, d_out)."""
    D = max(layer.in_features, layer.out_features)
    rows = ((layer.cfg.scale * layer.lora_V)[..., None] * layer.lora_U[:, None]).flatten(1)[:, :D]
    return rows if layer.in_features < layer.out_features else rows.mT
