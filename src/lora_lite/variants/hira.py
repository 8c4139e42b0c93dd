"""HiRA: a low-rank factor on every entry of the weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import AdapterConfig, Layer, ParamSpec, Variant, register


@dataclass(frozen=True, kw_only=True)
class HiRAConfig(AdapterConfig):
    variant: str = "hira"


@register
class HiRA(Variant):
    """Hadamard high-rank update: the weight times a low-rank matrix, entry by entry.

    W' = W ∘ (1 + BA), so y' = y + x (W ∘ BA)ᵀ; A (r, d_in) ~ U(±1/√d_in), B (d_out, r) = 0: an exact zero is added at
    the start. No scale: alpha is not used. r(d_in + d_out) parameters, an update of high rank. The weight is read and W
    ∘ BA built in every call: two products with a matrix of the weight's size. PEFT's default is r = 32. Huang et al.
    2025, HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models, ICLR.
    """

    name = "hira"
    config = HiRAConfig
    paper = "openreview.net/forum?id=TwJrTz9cRS"
    needs_weight = True
    ignores = ("alpha",)
    lr = 4.5e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: HiRAConfig) -> dict[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((cfg.r, d_in), init="kaiming", decay=False),
            "lora_B": ParamSpec((d_out, cfg.r), decay=False),
        }

    @staticmethod
    def forward(layer: Layer[HiRAConfig], x: Tensor, y: Tensor) -> Tensor:
        change = layer.once("change", lambda: layer.weight * (layer.lora_B @ layer.lora_A))
        return y + layer.dropout(x) @ change.mT
