"""SHiRA: a few entries of the weight are trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import AdapterConfig, Layer, ParamSpec, Variant, register
from ..ops.sparse import sparse_product
from ._sparse import position_spec, positions


@dataclass(frozen=True, kw_only=True)
class SHiRAConfig(AdapterConfig):
    variant: str = "shira"


@register
class SHiRA(Variant):
    """Sparse high-rank update: numbers at random, fixed positions of the weight.

    W' = W + S, S zero but for r(d_in + d_out) entries, LoRA's number of parameters (all entries where a layer has no
    more): lora_values = 0 trained, so an exact zero is added at the start, at the positions lora_at (2, n), drawn once
    per layer and saved. alpha is not used. Rank up to full; two such adapters hardly overlap, so that they can be
    added. S is never written out. The authors also choose positions by magnitude or gradient;
    PEFT draws the same positions for layers of the same shape where a seed is given. Bhardwaj et al. 2024, Sparse High
    Rank Adapters, arXiv 2406.13175.
    """

    name = "shira"
    config = SHiRAConfig
    paper = "2406.13175"
    family = "spectral and sparse"
    ignores = ("alpha",)
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: SHiRAConfig) -> dict[str, ParamSpec]:
        n = min(cfg.r * (d_in + d_out), d_in * d_out)
        return {"lora_values": ParamSpec((n,)), "lora_at": position_spec(d_out, d_in, n)}

    @staticmethod
    def forward(layer: Layer[SHiRAConfig], x: Tensor, y: Tensor) -> Tensor:
        return y + sparse_product(layer.dropout(x), layer.lora_values, *positions(layer), layer.out_features)
