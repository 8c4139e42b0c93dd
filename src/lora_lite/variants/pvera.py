"""PVeRA: VeRA whose bottleneck is drawn from a distribution that the input sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import AdapterConfig, Layer, ParamSpec, Variant, register
from ..ops.lowrank import shrink
from ._shared import kaiming_relu


@dataclass(frozen=True, kw_only=True)
class PVeRAConfig(AdapterConfig):
    variant: str = "pvera"
    r: int = 256
    d_initial: float = 0.1
    """Start of every entry of λ_d."""


@register
class PVeRA(Variant):
    """Probabilistic VeRA: while training, the bottleneck is a normal draw; afterwards it is its mean.

    (μ, log σ²) = λ_d ∘ (A drop(x)), z = μ + σ ∘ ε in training with ε ~ N(0, 1) from torch's generator, z = μ otherwise;
    y' = y + λ_b ∘ (B z). λ_d (2r) = 0.1, λ_b (d_out) = 0 trained, an exact zero at the start. A (2r, max d_in), B (max
    d_out, r) ~ U(±√(6/fan_in)) frozen, shared by all layers, cut to each and saved once. alpha is not used. Merging
    folds the mean in. 2r + d_out parameters per layer; 2r d_in + r d_out multiply-adds in training, r(d_in + d_out)
    otherwise. PVeRA: Probabilistic Vector-Based Random Matrix Adaptation 2025, arXiv 2512.07703.
    """

    name = "pvera"
    config = PVeRAConfig
    paper = "2512.07703"
    family = "shared or random bases"
    ignores = ("alpha",)
    noisy = True
    lr = 4e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: PVeRAConfig) -> dict[str, ParamSpec]:
        return {
            "lora_d": ParamSpec((2, cfg.r), init=f"constant:{cfg.d_initial}", decay=False),
            "lora_b": ParamSpec((d_out,), decay=False),
        }

    @staticmethod
    def shared_specs(targets: Any, cfg: PVeRAConfig) -> dict[str, ParamSpec]:
        r, d_in, d_out = (max(sizes) for sizes in zip(*((t.cfg.r, t.d_in, t.d_out) for t in targets), strict=True))
        return {
            "lora_A": ParamSpec((2, r, d_in), init=kaiming_relu, as_buffer=True),
            "lora_B": ParamSpec((d_out, r), init=kaiming_relu, as_buffer=True),
        }

    @staticmethod
    def forward(layer: Layer[PVeRAConfig], x: Tensor, y: Tensor) -> Tensor:
        A, B = bases(layer)
        if layer.training:
            mean, log_square = (shrink(layer.dropout(x), A.flatten(0, 1)) * layer.lora_d.flatten()).chunk(2, -1)
            noise = torch.randn_like(mean.mT).mT  # whose rows lie together: numbers are drawn faster
            z = mean + noise * (0.5 * log_square).exp()
        else:
            z = shrink(x, A[0]) * layer.lora_d[0]
        return torch.addcmul(y, (z @ B.mT).view(y.shape), layer.lora_b)


def bases(layer: Layer[PVeRAConfig]) -> tuple[Tensor, Tensor]:
    """The parts of A and B that belong to the layer."""
    r = layer.cfg.r
    return layer.lora_A[:, :r, : layer.in_features], layer.lora_B[: layer.out_features, :r]
