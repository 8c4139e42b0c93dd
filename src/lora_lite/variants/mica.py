"""MiCA: LoRA whose outputs are the weight's smallest singular directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import lowrank_update
from ..ops.svd import bottom_svd
from ._lowrank import ScaledConfig


@dataclass(frozen=True, kw_only=True)
class MiCAConfig(ScaledConfig):
    variant: str = "mica"


@register
class MiCA(Variant):
    """Minor component adaptation: B is frozen at the left singular vectors that the weight uses least.

    y' = y + s (x Aᵀ) Bᵀ, B (d_out, r) the left singular vectors of the r smallest singular values of W, frozen and
    saved; A (r, d_in) = 0 trained, so an exact zero is added at the start; s = alpha/r, or alpha/√r with `use_rslora`.
    r d_in parameters; the authors advise half of LoRA's rank and twice its rate. Needs the whole decomposition: no
    randomised one finds the small end. r(d_in + d_out) multiply-adds per token. Rüdiger and Raschka 2026, MiCA Learns
    More Knowledge Than LoRA and Full Fine-Tuning, arXiv 2604.01694.
    """

    name = "mica"
    config = MiCAConfig
    paper = "2604.01694"
    family = "low rank"
    needs_weight = True
    lr = 2e-3
    width_growth = 0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: MiCAConfig) -> dict[str, ParamSpec]:
        if cfg.r > min(d_in, d_out):
            raise ConfigError(f"rank {cfg.r} is more than a {d_in}->{d_out} weight has; lower r or use rank_pattern.")
        return {
            "lora_A": ParamSpec((cfg.r, d_in)),
            "lora_B": ParamSpec((d_out, cfg.r), init="empty", as_buffer=True),
        }

    @staticmethod
    def init(layer: Layer[MiCAConfig], cfg: MiCAConfig) -> None:
        W = layer.weight
        layer.lora_B = bottom_svd(W.to(torch.promote_types(torch.float32, W.dtype)), cfg.r)[0]

    @staticmethod
    def forward(layer: Layer[MiCAConfig], x: Tensor, y: Tensor) -> Tensor:
        return lowrank_update(y, layer.dropout(x), layer.lora_A, layer.lora_B, layer.cfg.scale)

    @staticmethod
    def factors(layer: Layer[MiCAConfig]) -> tuple[Tensor, Tensor]:
        return layer.lora_A, layer.cfg.scale * layer.lora_B
