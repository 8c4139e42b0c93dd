"""MiLoRA: LoRA that starts from the minor singular triplets of the weight."""

from __future__ import annotations

from dataclasses import dataclass

from ..core import AdapterConfig, Layer, register
from ..ops.linalg import precise
from ..ops.svd import balanced_factors, bottom_svd
from ._deviation import Deviation


@dataclass(frozen=True, kw_only=True)
class MiLoRAConfig(AdapterConfig):
    variant: str = "milora"


@register
class MiLoRA(Deviation):
    """Low-rank update that starts from the r smallest singular triplets of the weight, and so leaves what it does most
    alone.

    W = U S Vᵀ; A0 = (S/s)^½ Vᵀ, B0 = U (S/s)^½ of the last r triplets; y' = y + s (BA − B0A0) x with A = A0 + ΔA, B =
    B0 + ΔB. The paper replaces W by W − s B0A0; here W stays as it is. Needs the whole decomposition: no randomised one
    finds the small end. Wang et al. 2024, MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM
    Finetuning, arXiv 2406.09044.
    """

    name = "milora"
    config = MiLoRAConfig
    paper = "2406.09044"
    family = "low rank from the weight or from data"
    needs_weight = True
    lr = 3e-4

    @staticmethod
    def init(layer: Layer[MiLoRAConfig], cfg: MiLoRAConfig) -> None:
        layer.lora_A0, layer.lora_B0 = balanced_factors(*bottom_svd(precise(layer.weight), cfg.r), cfg.scale)
