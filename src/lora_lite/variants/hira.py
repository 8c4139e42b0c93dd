"""HiRA: a low-rank factor on every entry of the weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import AdapterConfig, Layer, ParamSpec, Variant, register
from ..ops.lowrank import gated


@dataclass(frozen=True, kw_only=True)
class HiRAConfig(AdapterConfig):
    variant: str = "hira"
    r: int = 32


@register
class HiRA(Variant):
    """Hadamard high-rank update: the weight times a low-rank matrix, entry by entry.

    W' = W ∘ (1 + BA), A (r, d_in) ~ U(±1/√d_in), B (d_out, r) = 0, so that W' is W bit for bit at the start. No scale:
    alpha is not used. r(d_in + d_out) parameters, an update of high rank. W' is made in every call, r d_in d_out
    multiply-adds, and the layer multiplies with it once. Huang et al. 2025, HiRA: Parameter-Efficient Hadamard
    High-Rank Adaptation for Large Language Models, ICLR.
    """

    name = "hira"
    config = HiRAConfig
    paper = "openreview.net/forum?id=TwJrTz9cRS"
    family = "with the weight"
    ignores = ("alpha", "dropout")
    lr = 4.5e-3
    width_growth = -0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: HiRAConfig) -> dict[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((cfg.r, d_in), init="kaiming", decay=False),
            "lora_B": ParamSpec((d_out, cfg.r), decay=False),
        }

    @staticmethod
    def weight(layer: Layer[HiRAConfig], W: Tensor) -> Tensor:
        return gated(W, layer.tiny("lora_B") @ layer.tiny("lora_A"))
