"""DoRA: LoRA on the directions of the weight's rows, and one trained length per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import Layer, ParamSpec, Variant, register
from ..ops.lowrank import inverse_root_minus_one, row_norm_square_change, scaled_lowrank_update
from ._lowrank import ScaledConfig


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(ScaledConfig):
    variant: str = "dora"
    lr_ratio_m: float = 1.0
    """Learning rate of the lengths over that of A and B in `param_groups`."""


@register
class DoRA(Variant):
    """Weight-decomposed low-rank update: direction and magnitude of every row train apart.

    V = W + s BA, A (r, d_in) ~ U(±1/√d_in), B (d_out, r) = 0; W' = m V/‖V‖ row by row with m = ‖W‖(1 + δ), δ (d_out) =
    0 trained. With g = m/‖V‖: y' = y + (g − 1)(y − b) + g s (drop(x) Aᵀ) Bᵀ, an exact zero more than y at the start. No
    gradient goes through ‖V‖. ‖V‖² = ‖W‖² (1 + e) with e‖W‖² = 2s⟨B, WAᵀ⟩ + s² rowsum(B(AAᵀ)∘B), and g − 1 = δρ + (ρ −
    1) with ρ = (1 + e)^−½: no dense V, no cancellation, and WAᵀ goes through the layer itself, so that a quantised base
    stays packed. ‖W‖ is kept in the file. PEFT builds V, multiplies dropped-out inputs by W again, and trains m itself
    instead of δ. Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353.
    r(d_in + d_out) + d_out multiply-adds per token, and r d_in d_out once per call (while decoding: once).
    """

    name = "dora"
    config = DoRAConfig
    paper = "2402.09353"
    family = "low rank"
    also = {"QDoRA": "on a 4-bit base"}
    lr = 5e-4

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: DoRAConfig) -> dict[str, ParamSpec]:
        precise = torch.promote_types(torch.float32, cfg.torch_dtype)
        return {
            "lora_A": ParamSpec((cfg.r, d_in), init="kaiming"),
            "lora_B": ParamSpec((d_out, cfg.r)),
            "lora_m": ParamSpec((d_out,), decay=False, lr_ratio=cfg.lr_ratio_m),
            "lora_norm": ParamSpec((d_out,), init="empty", as_buffer=True, dtype=precise),
        }

    @staticmethod
    def init(layer: Layer[DoRAConfig], cfg: DoRAConfig) -> None:
        layer.lora_norm = layer.row_norms()

    @staticmethod
    def forward(layer: Layer[DoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        s = layer.cfg.scale
        h, longer = layer.once("h", lambda: lengthened(layer, s, y.dtype))
        return scaled_lowrank_update(y, layer.dropout(x), layer.lora_A, longer, h, layer.bias, s)


def lengthened(layer: Layer[DoRAConfig], s: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """g − 1 (d_out,) and g B (d_out, r)."""
    A, B, m = layer.tiny("lora_A"), layer.tiny("lora_B"), layer.tiny("lora_m")
    with torch.no_grad():
        less = shortening(layer, A, B, s)
    h = torch.addcmul(less, m, 1 + less)
    return h.to(dtype), torch.addcmul(B, B, h[:, None]).to(dtype)


def shortening(layer: Layer[DoRAConfig], A: Tensor, B: Tensor, s: float) -> Tensor:
    """ρ − 1, ρ = ‖W‖/‖V‖ (d_out,)."""
    change = row_norm_square_change(layer.project(A).mT, A, B, s)
    norm = layer.tiny("lora_norm").clamp_min(1e-10)
    return inverse_root_minus_one(change / norm / norm)  # whose square may leave fp32
