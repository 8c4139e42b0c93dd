"""Parallel adapters: a small network beside a module, from its input to its output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import Layer, ParamSpec, Variant, register
from ._bottleneck import Activation, BottleneckOptions, bottleneck_specs, through


@dataclass(frozen=True, kw_only=True)
class ParallelAdapterConfig(BottleneckOptions):
    variant: str = "parallel_adapter"
    activation: Activation = "relu"
    target_names: tuple[str, ...] | None = ("mlp|ffn|feed_forward|feedforward",)
    """Modules by name, whose input and output are as wide as the residual stream."""


@register
class ParallelAdapter(Variant):
    """A bottleneck in parallel with a module (the feed-forward network): reads its input, adds to its output.

    y' = y + s (U f(D drop(x) + c) + e), x and y (…, d) the module's input and output, D (r, d), U (d, r) = 0, s =
    alpha/r. The paper scales by 4: alpha=4 r. Its Mix-and-Match adapter is this and prefix tuning, two adapters active
    together. 2rd + r + d parameters per module, 2rd multiply-adds per token. He et al. 2021, Towards a Unified View of
    Parameter-Efficient Transfer Learning, arXiv 2110.04366.
    """

    name = "parallel_adapter"
    config = ParallelAdapterConfig
    paper = "2110.04366"
    family = "bottlenecks"
    also = {
        "parallel": "",
        "Mix-and-Match": "active together with prefix_tuning",
        "MAM": "active together with prefix_tuning",
    }
    site = "module"
    affine = False
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: ParallelAdapterConfig) -> dict[str, ParamSpec]:
        return bottleneck_specs(d_in, d_out, cfg)

    @staticmethod
    def forward(layer: Layer[ParallelAdapterConfig], x: Tensor, y: Tensor) -> Tensor:
        return y + through(layer, x)
