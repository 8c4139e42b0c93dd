"""DiReFT: add a low-rank map of the residual stream to it at prompt tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import Layer, ParamSpec, Variant, register
from ._reft import ReFTConfig, check_rank, lowrank_edit


@dataclass(frozen=True, kw_only=True)
class DiReFTConfig(ReFTConfig):
    variant: str = "direft"


@register
class DiReFT(Variant):
    """Direct low-rank edit of the residual stream at prompt tokens: LoRA on hidden states.

    h' = h + s W₂ᵀ(W₁ h + b) after a block, W₁, W₂ (r, d), b (r), s = alpha/r (1 by default, as in the paper). W₁ ~
    U(±1/√d), W₂ = b = 0, so a fresh adapter adds an exact zero. pyreft's class of this name keeps W₂ᵀ orthonormal and
    drops W₂ h, the paper's method has no such constraint. Positions as in LoReFT. Wu et al. 2024, arXiv 2404.03592. lr
    9e-4, no weight decay.
    """

    name = "direft"
    config = DiReFTConfig
    paper = "2404.03592"
    family = "interventions in the stream"
    site = "block"
    affine = False
    lr = 9e-4

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: DiReFTConfig) -> dict[str, ParamSpec]:
        check_rank(cfg.r, d_out)
        shape = (cfg.edits, cfg.r, d_out)
        return {
            "lora_W1": ParamSpec(shape, init="kaiming", decay=False),
            "lora_W2": ParamSpec(shape, decay=False),
            "lora_b": ParamSpec(shape[:2], decay=False),
        }

    @staticmethod
    def forward(layer: Layer[DiReFTConfig], x: Tensor, y: Tensor) -> Tensor:
        return lowrank_edit(layer, y, "lora_W1", "lora_W2")
