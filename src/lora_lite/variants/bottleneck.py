"""Bottleneck adapters in series: Houlsby's, Pfeiffer's, AdapterPlus."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import Layer, ParamSpec, Variant, register
from ._bottleneck import WriterOptions, bottleneck_specs, through


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(WriterOptions):
    variant: str = "bottleneck"


@register
class Bottleneck(Variant):
    """Adapters in series (Houlsby, Pfeiffer, AdapterPlus): a small network on what a layer writes to the stream.

    y' = y + s (U f(D drop(y) + c) + e), D (r, d), U (d, r) = 0, c, e = 0, s = alpha/r. Houlsby et al. 2019, arXiv
    1902.00751, put one after the attention and one after the feed-forward network: the default here. Pfeiffer et al.
    2020, arXiv 2005.00247, only the second: `target_names=("down_proj",)`, relu. AdapterPlus, Steitz and Roth 2024,
    arXiv 2406.06820: that with gelu and `learned_scale`. The `adapters` library draws U small instead of zero, and on
    post-norm models reads the sum with the residual, after a LayerNorm: here y is the layer's output before it. r(d_in
    + d_out) + r + d_out parameters, 2rd multiply-adds per token; not affine, so it stays beside the weight."""

    name = "bottleneck"
    config = BottleneckConfig
    paper = "1902.00751"
    family = "bottlenecks"
    also = {
        "Houlsby": "",
        "Pfeiffer": 'target_names=("down_proj",), activation="relu"',
        "AdapterPlus": 'target_names=("down_proj",), activation="gelu", learned_scale=True',
    }
    affine = False
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: BottleneckConfig) -> dict[str, ParamSpec]:
        return bottleneck_specs(d_out, d_out, cfg)

    @staticmethod
    def forward(layer: Layer[BottleneckConfig], x: Tensor, y: Tensor) -> Tensor:
        return y + through(layer, y)
