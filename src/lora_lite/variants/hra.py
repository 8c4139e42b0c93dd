"""HRA: a chain of Householder reflections, in pairs that start as the identity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import lowrank_update
from ..ops.orthogonal import householder_pairs


@dataclass(frozen=True, kw_only=True)
class HRAConfig(AdapterConfig):
    variant: str = "hra"
    side: Literal["input", "output"] = "input"
    """Reflect the layer's input, as in the paper, or its output, bias included."""
    orthogonality: float = 0.0
    """λ of the penalty λ ‖I − ÛÛᵀ‖², Û the normalised vectors; the paper tries 0 and 1e-4. Pairs start parallel, so it
    is not 0 at the start."""

    def validate(self) -> None:
        super().validate()
        if not (math.isfinite(self.orthogonality) and self.orthogonality >= 0):
            raise ConfigError(f"HRAConfig.orthogonality must be finite and not negative, got {self.orthogonality}.")


@register
class HRA(Variant):
    """Orthogonal adaptation by r Householder reflections.

    W' = W H_1 H_2 ⋯ H_r with H_i = I − 2 û_i û_iᵀ, so x' = x H_r ⋯ H_1; or W' = H_1 ⋯ H_r W with `side="output"`. U (r,
    d), d = d_in or d_out. Vectors start equal in pairs, and two equal reflections cancel. U = U0 + ΔU, U0 ~
    U(±1/√⌈r/2⌉) frozen once per pair and saved, ΔU = 0 trained: as the authors start, whose ‖u‖ grows with √d, so that
    a step turns every û by 1.2 lr √r at any width; all pairs together are x + (x Zᵀ) M with two (r, d) matrices,
    exactly zero at the start: see `ops.orthogonal`. 2rd. With odd r the last vector moves against its frozen start, so
    every r starts at the identity; PEFT starts far from it then. PEFT multiplies r dense d x d matrices per forward.
    Its Gram-Schmidt mode (λ = ∞: I − 2QQᵀ) is never near the identity and is left out. Yuan et al. 2024, Bridging The
    Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation, arXiv 2405.17484.
    """

    name = "hra"
    config = HRAConfig
    paper = "2405.17484"
    family = "rotations and reflections"
    ignores = ("alpha", "dropout")
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: HRAConfig) -> dict[str, ParamSpec]:
        d = d_in if cfg.side == "input" else d_out
        return {
            "lora_U": ParamSpec((cfg.r, d), decay=False),
            "lora_U0": ParamSpec(((cfg.r + 1) // 2, d), init=fill_pairs, as_buffer=True),
        }

    @staticmethod
    def forward_input(layer: Layer[HRAConfig], x: Tensor) -> Tensor:
        return rotate(layer, x) if layer.cfg.side == "input" else x

    @staticmethod
    def forward(layer: Layer[HRAConfig], x: Tensor, y: Tensor) -> Tensor:
        return rotate(layer, y) if layer.cfg.side == "output" else y

    @staticmethod
    def penalty(layer: Layer[HRAConfig]) -> Tensor:
        U0, dU = layer.tiny("lora_U0"), layer.tiny("lora_U")
        V = torch.nn.functional.normalize(U0.repeat_interleave(2, 0)[: len(dU)] + dU, dim=-1)
        return layer.cfg.orthogonality * (torch.eye(len(V), dtype=V.dtype, device=V.device) - V @ V.mT).square().sum()


def fill_pairs(t: Tensor, g: Generator) -> None:
    """U(±1/√p) for the p pairs."""
    bound = t.shape[0] ** -0.5
    t.uniform_(-bound, bound, generator=g)


def rotate(layer: Layer[HRAConfig], v: Tensor) -> Tensor:
    """v H_r ⋯ H_1. An odd r is made even by the start of its last vector."""
    Z, M = layer.once("pairs", lambda: pairs(layer, v.dtype))
    return lowrank_update(v, v, Z, M.mT)


def pairs(layer: Layer[HRAConfig], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two (r, d) matrices of the whole product."""
    first, dU = layer.tiny("lora_U0"), layer.tiny("lora_U")
    U = torch.cat((dU[:-1], torch.zeros_like(dU[:1]), dU[-1:])) if len(dU) % 2 else dU
    a, b = U.view(len(first), 2, -1).unbind(1)
    Z, M = householder_pairs(first + a, b - a)
    return Z.to(dtype), M.to(dtype)
