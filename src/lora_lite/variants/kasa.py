"""KaSA: LoRA with trained singular values, on a weight without its smallest singular triplets."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import lowrank_update
from ..ops.svd import balanced_factors, bottom_svd
from ..ops.transforms import frobenius
from ._lowrank import ScaledConfig


@dataclass(frozen=True, kw_only=True)
class KaSAConfig(ScaledConfig):
    variant: str = "kasa"
    beta: float = 1e-4
    """Weight of ‖λ‖² in the penalty."""
    gamma: float = 1e-3
    """Weight of ‖BᵀB − I‖ + ‖AAᵀ − I‖ in the penalty."""

    def validate(self) -> None:
        super().validate()
        if not (math.isfinite(self.beta + self.gamma) and min(self.beta, self.gamma) >= 0):
            raise ConfigError(f"KaSAConfig: beta={self.beta} and gamma={self.gamma} must be finite and not negative.")


@register
class KaSA(Variant):
    """Knowledge-aware singular values: the base loses its r smallest triplets, and a low-rank update learns new ones.

    W = U S Vᵀ; y' = y − (x V_d) (U_d S_d)ᵀ + s ((x Aᵀ) ∘ λ) Bᵀ with the r smallest triplets U_d, S_d, V_d frozen and
    saved as lora_A0, lora_B0; A (r, d_in) ~ U(±1/√d_in), λ (r) ~ N(0, 1), B (d_out, r) = 0, s = alpha/r. A fresh
    adapter is the truncated base, not the base. r(d_in + d_out + 1) parameters. The penalty (`ll.penalty`) is β‖λ‖² +
    γ(‖BᵀB − I‖ + ‖AAᵀ − I‖), Frobenius norms, summed over the layers. PEFT and the authors overwrite the base weight.
    2r(d_in + d_out) multiply-adds per token. Wang et al. 2024, KaSA: Knowledge-Aware Singular-Value Adaptation of Large
    Language Models, arXiv 2412.06071.
    """

    name = "kasa"
    config = KaSAConfig
    paper = "2412.06071"
    family = "low rank"
    needs_weight = True
    identity_bound = math.inf
    lr = 5e-4

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: KaSAConfig) -> dict[str, ParamSpec]:
        if cfg.r >= min(d_in, d_out):
            raise ConfigError(f"rank {cfg.r} leaves nothing of a {d_in}->{d_out} weight; lower r or use rank_pattern.")
        return {
            "lora_A": ParamSpec((cfg.r, d_in), init="kaiming"),
            "lora_B": ParamSpec((d_out, cfg.r)),
            "lora_values": ParamSpec((cfg.r,), init="normal"),
            "lora_A0": ParamSpec((cfg.r, d_in), init="empty", as_buffer=True),
            "lora_B0": ParamSpec((d_out, cfg.r), init="empty", as_buffer=True),
        }

    @staticmethod
    def init(layer: Layer[KaSAConfig], cfg: KaSAConfig) -> None:
        W = layer.weight
        triplets = bottom_svd(W.to(torch.promote_types(torch.float32, W.dtype)), cfg.r)
        layer.lora_A0, layer.lora_B0 = balanced_factors(*triplets, 1.0)

    @staticmethod
    def forward(layer: Layer[KaSAConfig], x: Tensor, y: Tensor) -> Tensor:
        dropped = layer.dropout(x)
        if dropped is x:
            return lowrank_update(y, x, *layer.once("factors", lambda: KaSA.factors(layer)))
        y = lowrank_update(y, x, layer.lora_A0, layer.lora_B0, -1.0)
        return lowrank_update(y, dropped, layer.lora_A, layer.lora_B * layer.lora_values, layer.cfg.scale)

    @staticmethod
    def factors(layer: Layer[KaSAConfig]) -> tuple[Tensor, Tensor]:
        new = layer.cfg.scale * layer.lora_B * layer.lora_values
        return torch.cat((layer.lora_A, layer.lora_A0)), torch.cat((new, -layer.lora_B0), -1)

    @staticmethod
    def penalty(layer: Layer[KaSAConfig]) -> Tensor:
        A, B, values = layer.tiny("lora_A"), layer.tiny("lora_B"), layer.tiny("lora_values")
        eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
        apart = frobenius(B.mT @ B - eye) + frobenius(A @ A.mT - eye)
        return layer.cfg.beta * values.square().sum() + layer.cfg.gamma * apart
