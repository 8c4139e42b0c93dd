"""NoLA: LoRA's factors as combinations of frozen random ones; only the coefficients are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import lowrank_update
from ._lowrank import ScaledConfig


@dataclass(frozen=True, kw_only=True)
class NoLAConfig(ScaledConfig):
    variant: str = "nola"
    bases: int = 64
    """Number n of random matrices for A, and for B."""

    def validate(self) -> None:
        super().validate()
        if self.bases < 1:
            raise ConfigError(f"NoLAConfig.bases must be positive, got {self.bases}.")


@register
class NoLA(Variant):
    """Networks as linear combination of low-rank random bases: 2n numbers per layer, whatever its width and rank.

    y' = y + s B A drop(x), A = Σ_i a_i A_i and B = Σ_j b_j B_j, a, b (n) trained, a ~ N(0, 1), b = 0. A_i (r, d_in) ~
    U(±1/√d_in)/√n and B_j (d_out, r) ~ U(±1/√r)/√n frozen, one bank for all layers, cut to each, saved once: the
    authors draw a bank per layer from a seed, so that a file needs none. s = alpha/r. n r(d_in + d_out) multiply-adds
    per call for the factors, then LoRA's per token; while generating the factors are kept. Koohpayegani et al. 2023,
    NOLA: Compressing LoRA Using Linear Combination of Random Basis, arXiv 2310.02556."""

    name = "nola"
    config = NoLAConfig
    paper = "2310.02556"
    family = "shared or random bases"
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: NoLAConfig) -> dict[str, ParamSpec]:
        coefficients = {"lora_a": ParamSpec((cfg.bases,), init="normal", decay=False)}
        return coefficients | {"lora_b": ParamSpec((cfg.bases,), decay=False)}

    @staticmethod
    def shared_specs(targets: Any, cfg: NoLAConfig) -> dict[str, ParamSpec]:
        r, d_in, d_out = (max(sizes) for sizes in zip(*((t.cfg.r, t.d_in, t.d_out) for t in targets), strict=True))
        shapes = {"A": (cfg.bases, r, d_in), "B": (cfg.bases, d_out, r)}
        return {f"lora_{k}": ParamSpec(shape, init=_uniform, as_buffer=True) for k, shape in shapes.items()}

    @staticmethod
    def factors(layer: Layer[NoLAConfig]) -> tuple[Tensor, Tensor]:
        def combined() -> tuple[Tensor, Tensor]:
            r, d_in, d_out = layer.cfg.r, layer.in_features, layer.out_features
            A = torch.einsum("n,nrd->rd", layer.lora_a, layer.lora_A[:, :r, :d_in])
            B = torch.einsum("n,ndr->dr", layer.lora_b, layer.lora_B[:, :d_out, :r])
            return A, layer.cfg.scale * B

        return layer.once("factors", combined)

    @staticmethod
    def forward(layer: Layer[NoLAConfig], x: Tensor, y: Tensor) -> Tensor:
        return lowrank_update(y, layer.dropout(x), *NoLA.factors(layer))


def _uniform(t: Tensor, g: torch.Generator) -> None:
    bound = (t.shape[0] * t.shape[-1]) ** -0.5
    t.uniform_(-bound, bound, generator=g)
