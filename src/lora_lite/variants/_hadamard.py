"""The elementwise product of two low-rank updates, as a low-rank update while that is cheaper."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core import Layer, Variant
from ..ops.lowrank import lowrank_update


class Hadamard(Variant):
    """y' = y + s ((B1 A1) ∘ (B2 A2)) x: of rank r² at most, with the factors A[(i, k)] = A1_i ∘ A2_k and B[:, (i, k)] =
    B1_i ∘ B2_k. min(r²(d_in + d_out), d_in d_out) multiply-adds per token."""

    @staticmethod
    def forward(layer: Layer[Any], x: Tensor, y: Tensor) -> Tensor:
        d_in, d_out, s = layer.in_features, layer.out_features, layer.cfg.scale
        if layer.cfg.r**2 * (d_in + d_out) > d_in * d_out:
            dense = layer.once("dense", lambda: (layer.lora_B1 @ layer.lora_A1) * (layer.lora_B2 @ layer.lora_A2))
            return y + s * (layer.dropout(x) @ dense.mT)
        A, B = layer.once("factors", lambda: khatri_rao(layer))
        return lowrank_update(y, layer.dropout(x), A, B, s)

    @staticmethod
    def factors(layer: Layer[Any]) -> tuple[Tensor, Tensor]:
        A, B = khatri_rao(layer)
        return A, layer.cfg.scale * B


def khatri_rao(layer: Layer[Any]) -> tuple[Tensor, Tensor]:
    """A (r², d_in) and B (d_out, r²) with B A = (B1 A1) ∘ (B2 A2)."""
    A = layer.lora_A1[:, None] * layer.lora_A2
    B = layer.lora_B1[..., None] * layer.lora_B2[:, None]
    return A.flatten(0, 1), B.flatten(-2)
