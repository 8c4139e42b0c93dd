"""IA3 on the input side: one trained gain per input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import AdapterConfig, Layer, ParamSpec, Variant, register
from ..ops.lowrank import scale_outputs


@dataclass(frozen=True, kw_only=True)
class IA3FFConfig(AdapterConfig):
    variant: str = "ia3_ff"


@register
class IA3FF(Variant):
    """A gain per input feature, what IA3 does before the last layer of the feed-forward: x' = x + δ ∘ x, the published
    gain being 1 + δ.

    δ (d_in) = 0, so a fresh adapter adds an exact zero; the bias stays as it is. d_in parameters. Liu et al. 2022,
    Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, arXiv 2205.05638.
    """

    name = "ia3_ff"
    config = IA3FFConfig
    paper = "2205.05638"
    family = "gains and biases"
    ignores = ("r", "alpha", "dropout")
    lr = 5e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: IA3FFConfig) -> dict[str, ParamSpec]:
        return {"lora_g": ParamSpec((d_in,), decay=False)}

    @staticmethod
    def by_feature(layer: Layer[IA3FFConfig], side: str) -> tuple[Tensor, ...] | None:
        return (layer.lora_g,) if side == "input" else None

    @staticmethod
    def act(cfg: IA3FFConfig, v: Tensor, g: Tensor) -> Tensor:
        return scale_outputs(v, g, None)

    @staticmethod
    def forward_input(layer: Layer[IA3FFConfig], x: Tensor) -> Tensor:
        return scale_outputs(x, layer.lora_g, None)
