"""VeRA: one frozen random pair of factors for the whole model, two trained vectors per layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import AdapterConfig, Layer, ParamSpec, Variant, register
from ..ops.lowrank import shrink
from ._shared import kaiming_relu


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(AdapterConfig):
    variant: str = "vera"
    r: int = 256
    d_initial: float = 0.1
    """Start of every entry of λ_d."""


@register
class VeRA(Variant):
    """Vector-based random adaptation: two trained vectors scale a frozen random pair that all layers share.

    y' = y + λ_b ∘ (B (λ_d ∘ (A drop(x)))), λ_d (r) = 0.1, λ_b (d_out) = 0 trained: an exact zero is added at the start,
    where only λ_b has a gradient. A (r, max d_in), B (max d_out, r) ~ U(±√(6/fan_in)) frozen, cut to each layer, saved
    once: PEFT draws them again unless told otherwise. alpha is not used. r + d_out parameters per layer, r(d_in +
    d_out) multiply-adds. Kopiczko et al. 2023, VeRA: Vector-based Random Matrix Adaptation, arXiv 2310.11454.
    """

    name = "vera"
    config = VeRAConfig
    paper = "2310.11454"
    family = "shared or random bases"
    ignores = ("alpha",)
    lr = 4e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: VeRAConfig) -> dict[str, ParamSpec]:
        return {
            "lora_d": ParamSpec((cfg.r,), init=f"constant:{cfg.d_initial}", decay=False),
            "lora_b": ParamSpec((d_out,), decay=False),
        }

    @staticmethod
    def shared_specs(targets: Any, cfg: VeRAConfig) -> dict[str, ParamSpec]:
        r, d_in, d_out = (max(sizes) for sizes in zip(*((t.cfg.r, t.d_in, t.d_out) for t in targets), strict=True))
        return {
            "lora_A": ParamSpec((r, d_in), init=kaiming_relu, as_buffer=True),
            "lora_B": ParamSpec((d_out, r), init=kaiming_relu, as_buffer=True),
        }

    @staticmethod
    def forward(layer: Layer[VeRAConfig], x: Tensor, y: Tensor) -> Tensor:
        A, B = bases(layer)
        z = shrink(layer.dropout(x), A) * layer.lora_d
        return torch.addcmul(y, (z @ B.mT).view(y.shape), layer.lora_b)

    @staticmethod
    def factors(layer: Layer[VeRAConfig]) -> tuple[Tensor, Tensor]:
        A, B = bases(layer)
        return layer.lora_d[:, None] * A, layer.lora_b[:, None] * B


def bases(layer: Layer[VeRAConfig]) -> tuple[Tensor, Tensor]:
    """The parts of A and B that belong to the layer."""
    r = layer.cfg.r
    return layer.lora_A[:r, : layer.in_features], layer.lora_B[: layer.out_features, :r]
