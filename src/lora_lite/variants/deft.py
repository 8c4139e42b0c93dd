"""DEFT: a subspace of the outputs is taken out of the weight and filled anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import add_lowrank, shrink
from ..ops.transforms import orthonormal_basis


@dataclass(frozen=True, kw_only=True)
class DEFTConfig(AdapterConfig):
    variant: str = "deft"
    projection: Literal["relu", "qr"] = "relu"
    """Q Tᵀ with Q = P and T = relu(P), or the orthogonal projection with Q = T an orthonormal basis of P's columns."""


@register
class DEFT(Variant):
    """Decompositional update: outputs in a small trained subspace are removed and injected again.

    W' = (I − Q Tᵀ) W + s Q R, Q and T (d_out, r) made of P, s = alpha/r. P = P0 + ΔP with P0 ~ N(0, 0.02²) frozen and
    saved; R (r, d_in) = T0ᵀ W/s + ΔR, T0 that of P0, is the start at which W' = W. So y' = y + (s x ΔRᵀ + (y − b)(T0 −
    T)) Qᵀ with ΔP = ΔR = 0: an exact zero is added at the start, and the weight is never read. r(d_in + d_out)
    parameters. PEFT trains P and R themselves, and fresh it departs by rounding. Its `para` mode (no injection) is no
    identity and is left out. r(d_in + 2 d_out) multiply-adds per token. Kumar et al. 2025, DEFT: Decompositional
    Efficient Fine-Tuning for Text-to-Image Models, arXiv 2509.22793.
    """

    name = "deft"
    config = DEFTConfig
    paper = "2509.22793"
    family = "with the weight"
    lr = 1e-3
    width_growth = 1.0

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: DEFTConfig) -> dict[str, ParamSpec]:
        if cfg.r > d_out:
            raise ConfigError(f"rank {cfg.r} is more than the {d_out} outputs of a layer; lower r or use rank_pattern.")
        return {
            "lora_P": ParamSpec((d_out, cfg.r), decay=False),
            "lora_R": ParamSpec((cfg.r, d_in), decay=False),
            "lora_P0": ParamSpec((d_out, cfg.r), init="normal:0.02", as_buffer=True),
        }

    @staticmethod
    def forward(layer: Layer[DEFTConfig], x: Tensor, y: Tensor) -> Tensor:
        Q, less = layer.once("parts", lambda: parts(layer))
        own = y if layer.bias is None else y - layer.bias
        z = layer.cfg.scale * shrink(layer.dropout(x), layer.lora_R) + shrink(own, less.to(y.dtype).mT)
        return add_lowrank(y, z, Q.to(y.dtype))


def parts(layer: Layer[DEFTConfig]) -> tuple[Tensor, Tensor]:
    """Q and T0 − T, each (d_out, r)."""
    P0 = layer.tiny("lora_P0")
    P = P0 + layer.tiny("lora_P")
    if layer.cfg.projection == "relu":
        return P, P0.relu() - P.relu()
    Q, Q0 = orthonormal_basis(P), orthonormal_basis(P0)
    return Q, Q0 - Q
