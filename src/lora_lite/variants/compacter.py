"""Compacter: bottlenecks whose matrices are sums of Kronecker products with rules that all layers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, Variant, register
from ._bottleneck import ACTIVATIONS, Activation, WriterOptions


@dataclass(frozen=True, kw_only=True)
class CompacterConfig(WriterOptions):
    variant: str = "compacter"
    activation: Activation = "gelu"
    parts: int = 4
    """Number n of the Kronecker products, and the size of the rules; it divides the width and r."""


@register
class Compacter(Variant):
    """Compacter (PHM, parametrised hypercomplex bottlenecks of rank one): D = Σ_i R_i ⊗ (t_i u_iᵀ), and U alike.

    y' = y + s (U f(D drop(y) + c) + e) on what layers write to the stream, with rules R_i (n, n) of all layers,
    trained, and per layer vectors: D takes t (n, d/n) and u (n, r/n), U takes v (n, r/n) and w (n, d/n) = 0; s =
    alpha/r. Neither D nor U is built: with y cut into n parts, each matrix costs (d + n³ + r) multiply-adds per token
    instead of d·r. The rules are N(0, 1/n) and the vectors N(0, 1) at the start but for w; Karimi Mahabadi's code draws
    rules N(0, 0.01²) and vectors by Glorot, so that its steps are small. 2(d + r) + r + d parameters per layer, n³ in
    all. Karimi Mahabadi et al. 2021, Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, arXiv 2106.04647."""

    name = "compacter"
    config = CompacterConfig
    paper = "2106.04647"
    family = "bottlenecks"
    also = {"PHM": ""}
    affine = False
    lr = 3e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: CompacterConfig) -> dict[str, ParamSpec]:
        n = cfg.parts
        if d_out % n or cfg.r % n:
            raise ConfigError(f"parts={n} must divide r={cfg.r} and the {d_out} outputs; set parts or r.")
        wide, narrow = (n, d_out // n), (n, cfg.r // n)
        return {
            "lora_t": ParamSpec(wide, init=f"normal:{wide[1] ** -0.5}"),
            "lora_u": ParamSpec(narrow, init="normal"),
            "lora_v": ParamSpec(narrow, init=f"normal:{narrow[1] ** -0.5}"),
            "lora_w": ParamSpec(wide),
            "lora_c": ParamSpec((cfg.r,), decay=False),
            "lora_e": ParamSpec((d_out,), decay=False),
        }

    @staticmethod
    def shared_specs(targets: Any, cfg: CompacterConfig) -> dict[str, ParamSpec]:
        n = cfg.parts
        return {"lora_R": ParamSpec((n, n, n), init=f"normal:{n**-0.5}")}

    @staticmethod
    def forward(layer: Layer[CompacterConfig], x: Tensor, y: Tensor) -> Tensor:
        R, f = layer.lora_R, ACTIVATIONS[layer.cfg.activation]
        z = f(product(layer.dropout(y), R, layer.lora_t, layer.lora_u) + layer.lora_c)
        return y + layer.cfg.scale * (product(z, R, layer.lora_v, layer.lora_w) + layer.lora_e)


def product(h: Tensor, R: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """(Σ_i R_i ⊗ u_i t_iᵀ) h for h (…, n·p), R (n, n, n), t (n, p), u (n, q): (…, n·q)."""
    inner = h.view(*h.shape[:-1], R.shape[1], t.shape[1]) @ t.mT  # (…, n, n): part b of h, rule i
    return torch.einsum("...bi,iab,iq->...aq", inner, R, u).flatten(-2)
