"""LoRA from another start than zero: the start A0, B0 stays beside its trained deviation, so the base weight is never
rewritten."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, Variant
from ..ops.lowrank import deviation_factors, lowrank_update


class Deviation(Variant):
    """y' = y + s (BA − B0A0) x with A = A0 + ΔA, B = B0 + ΔB, computed as s (B (ΔA x) + ΔB (A0 x)): zero bit for bit at
    the start.

    Trained: `lora_A` = ΔA (r, d_in) and `lora_B` = ΔB (d_out, r), from zero. Frozen and saved: `lora_A0`, `lora_B0`.
    The published methods instead replace W by W − s B0A0, which rounds W and which a quantised or shared base forbids.
    """

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ParamSpec]:
        if cfg.r > min(d_in, d_out):
            raise ConfigError(f"rank {cfg.r} is more than a {d_in}->{d_out} weight has; lower r or use rank_pattern.")
        return {
            "lora_A": ParamSpec((cfg.r, d_in)),
            "lora_B": ParamSpec((d_out, cfg.r)),
            "lora_A0": ParamSpec((cfg.r, d_in), init="empty", as_buffer=True),
            "lora_B0": ParamSpec((d_out, cfg.r), init="empty", as_buffer=True),
        }

    @staticmethod
    def forward(layer: Layer[Any], x: Tensor, y: Tensor) -> Tensor:
        four = layer.lora_A, layer.lora_B, layer.lora_A0, layer.lora_B0
        A, B = layer.once("factors", lambda: deviation_factors(*four))
        return lowrank_update(y, layer.dropout(x), A, B, layer.cfg.scale)

    @staticmethod
    def factors(layer: Layer[Any]) -> tuple[Tensor, Tensor]:
        A, B = deviation_factors(layer.lora_A, layer.lora_B, layer.lora_A0, layer.lora_B0)
        return A, layer.cfg.scale * B
