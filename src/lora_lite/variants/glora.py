"""GLoRA: a weight that is scaled and added to, and a bias with three parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..core import AdapterConfig, Layer, ParamSpec, Variant, register

Matrix = Literal["low_rank", "vector", "constant", "none"]
Vector = Literal["vector", "constant", "none"]
Prompt = Literal["low_rank", "vector", "none"]


@dataclass(frozen=True, kw_only=True)
class GLoRAConfig(AdapterConfig):
    variant: str = "glora"
    matrices: Matrix = "low_rank"
    """Form of A and B: low rank, one number per output, one number, or none."""
    prompt: Prompt = "low_rank"
    """Form of C."""
    biases: Vector = "constant"
    """Form of D and E."""
    scaled_bias: bool = True
    """Whether there is a D; a layer without a bias has none."""

    def for_layer(self, has_bias: bool) -> GLoRAConfig:
        return self if has_bias or not self.scaled_bias else replace(self, scaled_bias=False)


@register
class GLoRA(Variant):
    """Generalized LoRA: scale and shift of weight and bias, each in a form of its own.

    W' = W + W ∘ A + B, b' = b + b ∘ D + E + W C, with A and B (d_out, d_in) low-rank products, one number per output or
    one for all, C (d_in) a product of rank r or free, D and E (d_out) one number or free; zero at the start. alpha is
    not used. PEFT's forms; the paper searches the form of each layer by evolution, which is not here. LyCORIS means
    another method by the name. 2r(d_in + d_out) parameters and r(d_in + 1) + 2; a low-rank A builds a (d_out, d_in)
    matrix per call. Chavan et al. 2023, One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning, arXiv
    2306.07967."""

    name = "glora"
    config = GLoRAConfig
    paper = "2306.07967"
    family = "with the weight"
    needs_weight = True
    ignores = ("alpha",)
    lr = 5e-4

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: GLoRAConfig) -> dict[str, ParamSpec]:
        forms = {"A": cfg.matrices, "B": cfg.matrices, "C": cfg.prompt, "D": cfg.biases, "E": cfg.biases}
        if not cfg.scaled_bias:
            forms["D"] = "none"
        specs: dict[str, ParamSpec] = {}
        for k, form in forms.items():
            n = d_in if k == "C" else d_out
            if form == "low_rank":
                specs[f"lora_{k}d"] = ParamSpec((n, cfg.r))
                specs[f"lora_{k}u"] = ParamSpec((cfg.r, 1 if k == "C" else d_in), init="kaiming")
            elif form != "none":
                specs[f"lora_{k}"] = ParamSpec((n if form == "vector" else 1,), decay=False)
        return specs

    @staticmethod
    def forward(layer: Layer[GLoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        cfg, b, dropped = layer.cfg, layer.bias, layer.dropout(x)
        if cfg.matrices == "low_rank":
            change = layer.weight * (layer.lora_Ad @ layer.lora_Au) + layer.lora_Bd @ layer.lora_Bu
            y_new = y + dropped @ change.mT
        elif cfg.matrices == "none":
            y_new = y
        else:
            W_x = dropped @ layer.weight.mT
            y_new = y + W_x * layer.lora_A + dropped.sum(-1, keepdim=True) * layer.lora_B
        shifts: list[Any] = []
        if cfg.prompt != "none":
            C = (layer.lora_Cd @ layer.lora_Cu)[:, 0] if cfg.prompt == "low_rank" else layer.lora_C
            shifts.append(layer.project(C[None])[0])
        if cfg.biases != "none":
            shifts.append(layer.lora_E.expand(layer.out_features))
            if b is not None and cfg.scaled_bias:
                shifts.append(b * layer.lora_D)
        return y_new + torch.stack(shifts).sum(0) if shifts else y_new
