"""LoRA-FA: LoRA with A frozen, so that training keeps no layer input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ..core import ConfigError, Layer, ParamSpec, register
from ..ops.stiefel import orthonormal_rows
from ._lowrank import LowRank, ScaledConfig


@dataclass(frozen=True, kw_only=True)
class LoRAFAConfig(ScaledConfig):
    variant: str = "lora_fa"
    init_A: Literal["orthogonal", "kaiming"] = "orthogonal"
    """Rows of A: orthogonal with the mean length 1/√3 of "kaiming" ones, or U(±1/√d_in)."""


def orthogonal_rows(A: Tensor, generator: Generator) -> None:
    """Fill A (r, d_in) with random orthogonal rows of length 1/√3."""
    A.copy_(orthonormal_rows(torch.randn(A.shape[1], A.shape[0], generator=generator).mT) / 3**0.5)


@register
class LoRAFA(LowRank):
    """Low-rank update whose first factor is frozen.

    y' = y + s (drop(x) Aᵀ) Bᵀ, A (r, d_in) random and frozen, B (d_out, r) = 0 trained. Backward keeps xAᵀ (tokens, r)
    instead of x. With B the gradient step on W is −(s²)G AᵀA, bent by AAᵀ where the rows of A are not orthogonal; later
    versions (and PEFT's optimiser for it) undo that with (AAᵀ)⁻¹ after every backward pass. Orthogonal rows make the
    correction a constant, which Adam does not see, so any optimiser will do. Same multiply-adds as LoRA, half its
    trained parameters. Zhang et al. 2023, LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models
    Fine-tuning, arXiv 2308.03303.
    """

    name = "lora_fa"
    config = LoRAFAConfig
    paper = "2308.03303"
    family = "low rank"
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: LoRAFAConfig) -> dict[str, ParamSpec]:
        if cfg.init_A == "orthogonal" and cfg.r > d_in:
            raise ConfigError(
                f"{cfg.r} orthogonal rows do not fit into {d_in} inputs; lower r or use init_A='kaiming'."
            )
        init = orthogonal_rows if cfg.init_A == "orthogonal" else "kaiming"
        return {"lora_A": ParamSpec((cfg.r, d_in), init=init, as_buffer=True), "lora_B": ParamSpec((d_out, cfg.r))}

    @staticmethod
    def from_factors(layer: Layer[LoRAFAConfig], A: Tensor, B: Tensor) -> None:
        layer.lora_A, layer.lora_B = A, B / layer.cfg.scale
