"""DeLoRA: a low-rank update of directions, whose strength is one trained number."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import lowrank_update
from ..ops.orthogonal import unit_pair


@dataclass(frozen=True, kw_only=True)
class DeLoRAConfig(AdapterConfig):
    variant: str = "delora"
    strength: float = 8.0
    """Start of λ; ‖ΔW‖ never exceeds 2λ times the largest column norm of W. The paper takes 4 to 12."""
    lr_ratio_strength: float = 0.5
    """Learning rate of λ over that of the directions in `param_groups`."""

    def validate(self) -> None:
        super().validate()
        if not (math.isfinite(self.strength) and self.strength != 0):
            raise ConfigError(
                f"DeLoRAConfig.strength must be finite and not 0 (no gradient would flow), got {self.strength}."
            )


@register
class DeLoRA(Variant):
    """Low-rank update with normalised rank-one parts: angles and strength are trained apart.

    N(B, A) = Σᵢ bᵢ aᵢᵀ/(‖bᵢ‖‖aᵢ‖); y' = y + (λ/r) (N(B, A) − N(B0, A0)) (w ∘ x), w (d_in) the column norms of W, λ (1,)
    trained. A0 (r, d_in), B0 (d_out, r) ~ U(±1/√last dim) frozen; A = A0 + ΔA, B = B0 + ΔB from zero. α is not used.
    With â, b̂ of length 1: N − N0 = B̂ (Â − Â0) + (B̂ − B̂0) Â0, each difference formed without cancellation: an exact
    zero at the start, and one small step makes one small change. λ multiplies both halves, as in the authors' code.
    PEFT starts at B = 0 without a frozen half: the norm then makes ‖ΔW‖ jump to its full size in the first step at any
    learning rate. Bini et al. 2025, DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation, arXiv 2503.18225.
    2r(d_in + d_out) multiply-adds per token.
    """

    name = "delora"
    config = DeLoRAConfig
    paper = "2503.18225"
    family = "low rank"
    ignores = ("alpha",)
    lr = 3e-3
    width_growth = 0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: DeLoRAConfig) -> dict[str, ParamSpec]:
        precise = torch.promote_types(torch.float32, cfg.torch_dtype)
        return {
            "lora_A": ParamSpec((cfg.r, d_in)),
            "lora_B": ParamSpec((d_out, cfg.r)),
            "lora_lambda": ParamSpec(
                (1,), init=f"constant:{cfg.strength}", decay=False, lr_ratio=cfg.lr_ratio_strength, dtype=precise
            ),
            "lora_A0": ParamSpec((cfg.r, d_in), init="kaiming", as_buffer=True),
            "lora_B0": ParamSpec((d_out, cfg.r), init="kaiming", as_buffer=True),
            "lora_w": ParamSpec((d_in,), init="empty", as_buffer=True, dtype=precise),
        }

    @staticmethod
    def init(layer: Layer[DeLoRAConfig], cfg: DeLoRAConfig) -> None:
        layer.lora_w = layer.column_norms()

    @staticmethod
    def factors(layer: Layer[DeLoRAConfig]) -> tuple[Tensor, Tensor]:
        A0, dA = unit_pair(layer.tiny("lora_A0"), layer.tiny("lora_A"))
        B0, dB = unit_pair(layer.tiny("lora_B0").mT, layer.tiny("lora_B").mT)
        A = torch.cat((dA, A0)) * layer.tiny("lora_w")
        B = torch.cat((B0 + dB, dB)).mT * (layer.tiny("lora_lambda") / layer.cfg.r)
        return A.to(layer.lora_A.dtype), B.to(layer.lora_B.dtype)

    @staticmethod
    def forward(layer: Layer[DeLoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        return lowrank_update(y, layer.dropout(x), *layer.once("factors", lambda: DeLoRA.factors(layer)))
