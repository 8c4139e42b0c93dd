"""Super-Tuning: the largest entries of the weight are trained, beside a low-rank update if asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import lowrank_update
from ..ops.sparse import sparse_product
from ._sparse import largest, positions


@dataclass(frozen=True, kw_only=True)
class SuperTuningConfig(AdapterConfig):
    variant: str = "supertuning"
    share: float = 0.01
    """Share of the weight's entries that are trained."""
    largest: bool = True
    """The largest in absolute value, or else the smallest."""
    low_rank: bool = False
    """Supra: LoRA of rank r and scale alpha/r beside them."""

    def validate(self) -> None:
        super().validate()
        if not 0 < self.share <= 1:
            raise ConfigError(f"SuperTuningConfig.share must lie in (0, 1], got {self.share}.")


@register
class SuperTuning(Variant):
    """Sparse update of the entries of the weight with the largest absolute values.

    W' = W + S, S zero but for n = ⌊share · d_in d_out⌋ trained numbers lora_values = 0 at the places lora_at (2, n) of
    W's largest entries, chosen at attach and saved; an exact zero is added at the start, and S is never written out.
    With `low_rank`, Supra, LoRA's s BA is added, s = alpha/r; otherwise r and alpha are not used. PEFT writes W + S out
    in every call. Super-Tuning 2026, arXiv 2607.09287.
    """

    name = "supertuning"
    config = SuperTuningConfig
    paper = "2607.09287"
    family = "spectral and sparse"
    also = {"Supra": "low_rank=True"}
    ignores = ("r", "alpha")
    needs_weight = True
    lr = 1e-3
    width_growth = 0.75

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: SuperTuningConfig) -> dict[str, ParamSpec]:
        n = int(cfg.share * d_in * d_out)
        if n < 1:
            raise ConfigError(f"share={cfg.share} leaves no entry of a {d_in}->{d_out} weight; raise it.")
        at = ParamSpec((2, n), init="empty", as_buffer=True, dtype=torch.int32)
        specs = {"lora_values": ParamSpec((n,)), "lora_at": at}
        if cfg.low_rank:
            specs |= {"lora_A": ParamSpec((cfg.r, d_in), init="kaiming"), "lora_B": ParamSpec((d_out, cfg.r))}
        return specs

    @staticmethod
    def init(layer: Layer[SuperTuningConfig], cfg: SuperTuningConfig) -> None:
        layer.lora_at = largest(layer.weight, layer.lora_values.shape[0], smallest=not cfg.largest)

    @staticmethod
    def forward(layer: Layer[SuperTuningConfig], x: Tensor, y: Tensor) -> Tensor:
        x = layer.dropout(x)
        y = y + sparse_product(x, layer.lora_values, *positions(layer), layer.out_features)
        return lowrank_update(y, x, layer.lora_A, layer.lora_B, layer.cfg.scale) if layer.cfg.low_rank else y
