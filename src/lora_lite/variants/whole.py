"""Whole: a trained change of every parameter of a layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from ..core import AdapterConfig, Layer, ParamSpec, Variant, register


@dataclass(frozen=True, kw_only=True)
class WholeConfig(AdapterConfig):
    variant: str = "whole"
    bias: bool = True
    """Train the biases too; a layer without one gets none."""

    def for_layer(self, has_bias: bool) -> AdapterConfig:
        return dataclasses.replace(self, bias=self.bias and has_bias)


@register
class Whole(Variant):
    """Full fine-tuning of a layer: y' = y + ΔW x + Δb.

    ΔW (d_out, d_in) = 0 and Δb (d_out) = 0, so a fresh adapter adds an exact zero, the base stays as it is, and several
    adapters share it: each has its own copy of the layer, stored as the difference. Weight decay pulls to the base.
    d_out·d_in + d_out parameters. What `train_modules` puts on heads beside another method. On norms
    (`target_kinds=("norm",)`) it is the tuning of layer norms, y' = y + Δw ∘ n(x) + Δb with the normalised input n(x)
    (Zhao et al. 2023, Tuning LayerNorm in Attention, arXiv 2312.11420). PEFT's modules_to_save and LN Tuning replace
    the module by a trained copy instead.
    """

    name = "whole"
    config = WholeConfig
    paper = "2312.11420"
    family = "gains and biases"
    also = {"LN tuning": 'target_kinds=("norm",)', "full fine-tuning": "", "modules_to_save": ""}
    ignores = ("r", "alpha")
    norms = True
    holds = "modules"
    lr = 1e-4
    width_growth = 1.0

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: WholeConfig) -> dict[str, ParamSpec]:
        specs = {"lora_W": ParamSpec((d_out, d_in))}
        return {**specs, "lora_b": ParamSpec((d_out,), decay=False)} if cfg.bias else specs

    @staticmethod
    def forward(layer: Layer[WholeConfig], x: Tensor, y: Tensor) -> Tensor:
        y = y + layer.dropout(x) @ layer.lora_W.mT
        return y + layer.lora_b if layer.cfg.bias else y
