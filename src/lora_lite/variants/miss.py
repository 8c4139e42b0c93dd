"""MiSS: one trained block that every piece of the input shares."""

# torch leaves what these methods of a tensor return undeclared
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import add_lowrank


@dataclass(frozen=True, kw_only=True)
class MiSSConfig(AdapterConfig):
    variant: str = "miss"
    mini: int | None = None
    """Train this many columns of D only and repeat them over the outputs; must divide d_out. None trains all."""

    def validate(self) -> None:
        super().validate()
        if self.mini is not None and self.mini < 1:
            raise ConfigError(f"MiSSConfig.mini must be positive or None, got {self.mini}.")


@register
class MiSS(Variant):
    """Low-rank update with one factor: the input's pieces are summed, and one matrix does the rest.

    y' = y + (Σ_g x_g) D, x_g the pieces of r inputs (the last one filled up with zeros), D (r, d_out) = 0 trained, so
    an exact zero is added at the start. r d_out parameters, half of LoRA's at the same r; alpha is not used. It is LoRA
    with A = [I I … I] frozen and never built. `mini`: D (r, mini), repeated along the outputs. PEFT's default is r =
    64. d_in + r d_out multiply-adds per token. Kang and Yin 2024, MiSS: Revisiting the Trade-off in LoRA with an
    Efficient Shard-Sharing Structure, arXiv 2409.15371.
    """

    name = "miss"
    config = MiSSConfig
    paper = "2409.15371"
    family = "products"
    also = {"Bone": ""}
    ignores = ("alpha",)
    lr = 2e-4
    width_growth = 0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: MiSSConfig) -> dict[str, ParamSpec]:
        if cfg.r > d_in:
            raise ConfigError(f"rank {cfg.r} is more than the {d_in} inputs of a layer; lower r or use rank_pattern.")
        if d_out % (cfg.mini or 1):
            raise ConfigError(f"mini={cfg.mini} does not divide the {d_out} outputs of a layer; choose a divisor.")
        return {"lora_D": ParamSpec((cfg.r, cfg.mini or d_out))}

    @staticmethod
    def forward(layer: Layer[MiSSConfig], x: Tensor, y: Tensor) -> Tensor:
        r, x = layer.cfg.r, layer.dropout(x)
        missing = -x.shape[-1] % r
        x = F.pad(x, (0, missing)) if missing else x
        pieces = x.reshape(*x.shape[:-1], x.shape[-1] // r, r)
        return add_lowrank(y, pieces.sum(-2), spread(layer).mT)

    @staticmethod
    def factors(layer: Layer[MiSSConfig]) -> tuple[Tensor, Tensor]:
        d, r = layer.in_features, layer.cfg.r
        D = spread(layer)
        return torch.eye(r, dtype=D.dtype, device=D.device).repeat(1, -(-d // r))[:, :d], D.mT


def spread(layer: Layer[MiSSConfig]) -> Tensor:
    """D (r, d_out)."""
    D = layer.lora_D
    return D.repeat(1, layer.out_features // D.shape[1]) if layer.cfg.mini else D
