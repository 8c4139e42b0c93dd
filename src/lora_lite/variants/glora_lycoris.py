"""LyCORIS's GLoRA: a low-rank update of the inputs and one of the outputs, through one pair of factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import Layer, ParamSpec, Variant, register
from ..ops.lowrank import lowrank_update
from ._lowrank import ScaledConfig


@dataclass(frozen=True, kw_only=True)
class GLoRALycorisConfig(ScaledConfig):
    variant: str = "glora_lycoris"


@register
class GLoRALycoris(Variant):
    """Generalized LoRA as LyCORIS has it: the weight times a low-rank matrix, plus another one.

    W' = W + s (W A1 A2 + B1 B2), A2 and B2 (r, d_in) ~ U(±1/√d_in), A1 (d_in, r) = 0, B1 (d_out, r) = 0: an exact zero
    is added at the start. s = alpha/r, or alpha/√r with `use_rslora`. Computed as an update of rank 2r, [W A1, B1] [A2;
    B2], for which r rows go through the layer in each call. LyCORIS's tensors a1, a2, b1, b2, where a2
    and b2 start from zero. r(3 d_in + d_out) parameters, 2r(d_in + d_out) multiply-adds per token. The rate is LoRA's,
    a guess. After Chavan et al. 2023, One-for-All: Generalized LoRA, arXiv 2306.07967, whose own forms are `glora`."""

    name = "glora_lycoris"
    config = GLoRALycorisConfig
    paper = "2306.07967"
    family = "with the weight"
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: GLoRALycorisConfig) -> dict[str, ParamSpec]:
        return {
            "lora_A1": ParamSpec((d_in, cfg.r)),
            "lora_A2": ParamSpec((cfg.r, d_in), init="kaiming"),
            "lora_B1": ParamSpec((d_out, cfg.r)),
            "lora_B2": ParamSpec((cfg.r, d_in), init="kaiming"),
        }

    @staticmethod
    def forward(layer: Layer[GLoRALycorisConfig], x: Tensor, y: Tensor) -> Tensor:
        A, B = layer.once("factors", lambda: _factors(layer))
        return lowrank_update(y, layer.dropout(x), A, B, layer.cfg.scale)

    @staticmethod
    def factors(layer: Layer[GLoRALycorisConfig]) -> tuple[Tensor, Tensor]:
        A, B = _factors(layer)
        return A, layer.cfg.scale * B


def _factors(layer: Layer[GLoRALycorisConfig]) -> tuple[Tensor, Tensor]:
    """(2r, d_in) and (d_out, 2r)."""
    WA1 = layer.project(layer.lora_A1.mT).mT
    return torch.cat((layer.lora_A2, layer.lora_B2)), torch.cat((WA1, layer.lora_B1), 1)
