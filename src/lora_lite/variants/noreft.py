"""NoReFT: LoReFT whose directions need not be orthonormal."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import Layer, ParamSpec, Variant, register
from ._reft import ReFTConfig, check_rank, lowrank_edit


@dataclass(frozen=True, kw_only=True)
class NoReFTConfig(ReFTConfig):
    variant: str = "noreft"


@register
class NoReFT(Variant):
    """Low-rank edit of the residual stream at prompt tokens, without orthonormality.

    h' = h + s W₂ᵀ(W₁ h + b − W₂ h) after a block, W₁, W₂ (r, d), b (r), s = alpha/r (1 by default, as in the paper).
    Trained are W₂, D = W₁ − W₂ and b: h' = h + s W₂ᵀ(D h + b). W₂ ~ U(±1/√d), D = b = 0: an exact identity from which D
    and b learn at once. Positions as in LoReFT; one QR per call cheaper. Wu et al. 2024, arXiv 2404.03592, an ablation
    of theirs. lr 9e-4, no weight decay.
    """

    name = "noreft"
    config = NoReFTConfig
    paper = "2404.03592"
    family = "interventions in the stream"
    site = "block"
    affine = False
    lr = 9e-4
    width_growth = 0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: NoReFTConfig) -> dict[str, ParamSpec]:
        check_rank(cfg.r, d_out)
        shape = (cfg.edits, cfg.r, d_out)
        return {
            "lora_W2": ParamSpec(shape, init="kaiming", decay=False),
            "lora_D": ParamSpec(shape, decay=False),
            "lora_b": ParamSpec(shape[:2], decay=False),
        }

    @staticmethod
    def forward(layer: Layer[NoReFTConfig], x: Tensor, y: Tensor) -> Tensor:
        return lowrank_edit(layer, y, "lora_D", "lora_W2")
