"""SingLoRA: a symmetric update from one factor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import Layer, ParamSpec, Variant, register
from ..ops.lowrank import deviation_factors, deviation_update
from ._lowrank import ScaledConfig


@dataclass(frozen=True, kw_only=True)
class SingLoRAConfig(ScaledConfig):
    variant: str = "singlora"


@register
class SingLoRA(Variant):
    """Symmetric low-rank update: one matrix, which cannot disagree with itself about scale.

    A (max(d_in, d_out), r) = A0 + ΔA; y' = y + s (A_out A_inᵀ − A0_out A0_inᵀ) x, A_out and A_in the first d_out and
    d_in rows, s = alpha/r, or alpha/√r with `use_rslora`. A0 ~ U(±1/√d) frozen and saved, ΔA = 0 trained: an exact zero
    is added at the start. r max(d_in, d_out) parameters. The paper has no subtraction: it multiplies A Aᵀ by u(t) = min
    (t/T, 1), so that its first step has no gradient and the drawn A0 A0ᵀ stays in the weight. 2r(d_in + d_out)
    multiply-adds per token. Bensaïd et al. 2025, SingLoRA: Low Rank Adaptation Using a Single Matrix, arXiv 2507.05566.
    """

    name = "singlora"
    config = SingLoRAConfig
    paper = "2507.05566"
    family = "low rank"
    lr = 1e-3
    width_growth = 0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: SingLoRAConfig) -> dict[str, ParamSpec]:
        d = max(d_in, d_out)
        return {
            "lora_A": ParamSpec((cfg.r, d)),  # transposed, as the other pages store it
            "lora_A0": ParamSpec((cfg.r, d), init="kaiming", as_buffer=True),
        }

    @staticmethod
    def forward(layer: Layer[SingLoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        return deviation_update(y, layer.dropout(x), *sides(layer), layer.cfg.scale)

    @staticmethod
    def factors(layer: Layer[SingLoRAConfig]) -> tuple[Tensor, Tensor]:
        A, B = deviation_factors(*sides(layer))
        return A, layer.cfg.scale * B


def sides(layer: Layer[SingLoRAConfig]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ΔA_inᵀ, ΔA_out, A0_inᵀ, A0_out."""
    A, A0, d_in, d_out = layer.lora_A, layer.lora_A0, layer.in_features, layer.out_features
    return A[:, :d_in], A[:, :d_out].mT, A0[:, :d_in], A0[:, :d_out].mT
