"""PEANuT: a small network reads the weight and writes its change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import lowrank_update
from ._lowrank import ScaledConfig

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": F.tanh}


@dataclass(frozen=True, kw_only=True)
class PEANuTConfig(ScaledConfig):
    variant: str = "peanut"
    depth: int = 0
    """Pairs of an encoder and a decoder (r, r), each with a residual, between the first and the last layer."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """f, applied to every entry."""

    def validate(self) -> None:
        super().validate()
        if self.depth < 0:
            raise ConfigError(f"PEANuTConfig.depth must not be negative, got {self.depth}.")


@register
class PEANuT(Variant):
    """Weight-aware tweaker: the update is a small network's output, and its inputs are the columns of the weight.

    ΔW = s B f(A W), A (r, d_out) ~ U(±1/√d_out), B (d_out, r) = 0, f elementwise: LoRA whose first factor is f(A W), so
    affine in x. An exact zero is added at the start. s = alpha/r, or alpha/√r with `use_rslora` (PEFT: 1 at any r, and
    r = 32). With depth n, h = f(A W) goes through encoders h_(i+1) = f(E_i h_i) and decoders back, g = f(D_i g) + h_i.
    2r d_out + 2n r² parameters. The weight is read in every call: r d_in d_out multiply-adds. Zhong et al. 2024,
    PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers, arXiv 2410.01870.
    """

    name = "peanut"
    config = PEANuTConfig
    paper = "2410.01870"
    family = "with the weight"
    needs_weight = True
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: PEANuTConfig) -> dict[str, ParamSpec]:
        square = ParamSpec((cfg.r, cfg.r), init="kaiming")
        inner = {f"lora_{side}{i}": square for i in range(cfg.depth) for side in "ED"}
        return {"lora_A": ParamSpec((cfg.r, d_out), init="kaiming"), **inner, "lora_B": ParamSpec((d_out, cfg.r))}

    @staticmethod
    def forward(layer: Layer[PEANuTConfig], x: Tensor, y: Tensor) -> Tensor:
        A = layer.once("A", lambda: read(layer))
        return lowrank_update(y, layer.dropout(x), A, layer.lora_B, layer.cfg.scale)

    @staticmethod
    def factors(layer: Layer[PEANuTConfig]) -> tuple[Tensor, Tensor]:
        return read(layer), layer.cfg.scale * layer.lora_B


def read(layer: Layer[PEANuTConfig]) -> Tensor:
    """The network's last hidden layer for every column of the weight, (r, d_in)."""
    f, n = ACTIVATIONS[layer.cfg.activation], layer.cfg.depth
    W = layer.weight
    levels = [f(layer.lora_A @ W)]
    for i in range(n):
        levels.append(f(getattr(layer, f"lora_E{i}") @ levels[-1]))
    h = levels.pop()
    for i in range(n):
        h = f(getattr(layer, f"lora_D{i}") @ h) + levels.pop()
    return h
