"""BitFit: a trained change of the bias."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import AdapterConfig, Layer, ParamSpec, Variant, register


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(AdapterConfig):
    variant: str = "bitfit"


@register
class BitFit(Variant):
    """Train biases only: y' = y + δ.

    δ (d_out) = 0, so a fresh adapter adds an exact zero. Layers without a bias get one, and merging writes it. d_out
    parameters. The paper trains the biases that a model has, in place; δ leaves the base as it is, and several adapters
    share it. Ben Zaken, Ravfogel, Goldberg 2021, BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
    Masked Language-models, arXiv 2106.10199. PEFT's BEFT (arXiv 2509.15974) is the same function.
    """

    name = "bitfit"
    config = BitFitConfig
    paper = "2106.10199"
    family = "gains and biases"
    also = {"BEFT": ""}
    ignores = ("r", "alpha", "dropout")
    norms = True
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: BitFitConfig) -> dict[str, ParamSpec]:
        return {"lora_b": ParamSpec((d_out,), decay=False)}

    @staticmethod
    def by_feature(layer: Layer[BitFitConfig], side: str) -> tuple[Tensor, ...] | None:
        return (layer.lora_b,) if side == "output" else None

    @staticmethod
    def act(cfg: BitFitConfig, v: Tensor, b: Tensor) -> Tensor:
        return v + b

    @staticmethod
    def forward(layer: Layer[BitFitConfig], x: Tensor, y: Tensor) -> Tensor:
        return y + layer.lora_b
