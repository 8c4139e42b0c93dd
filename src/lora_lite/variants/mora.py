"""MoRA: one square matrix on chunks of the input."""

# torch leaves what these methods of a tensor return undeclared
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core import AdapterConfig, Layer, ParamSpec, Variant, register


@dataclass(frozen=True, kw_only=True)
class MoRAConfig(AdapterConfig):
    variant: str = "mora"
    chunks: Literal["rotated", "summed"] = "rotated"
    """Every chunk through M, turned by its place (the authors' type 6, for small r), or their sum through M (type 1,
    for large r)."""


@register
class MoRA(Variant):
    """High-rank update: one square matrix, applied to chunks of the input.

    x is cut into chunks x_i of q = round √(r(d_in + d_out)) inputs (at most d_in; even where rotated), the last one
    filled up with the first inputs; y' = y + (M R_0 x_0, M R_1 x_1, …), R_i the rotary embedding of position i, cut or
    repeated to d_out; or y' = y + (z, z, …) with z = M Σ x_i. M (q, q) = 0 trained, an exact zero at the start: about
    LoRA's number of parameters and rank q. alpha is not used. The rotations are put into M, q d_in numbers. Chunks that
    d_out cuts off do not count, as in the authors' code, so a layer that narrows ignores its last inputs. q min(d_in,
    d_out) multiply-adds per token, summed q². Jiang et al. 2024, MoRA: High-Rank Updating for Parameter-Efficient
    Fine-Tuning, arXiv 2405.12130.
    """

    name = "mora"
    config = MoRAConfig
    paper = "2405.12130"
    family = "products"
    ignores = ("alpha",)
    lr = 3e-4
    width_growth = 0.25

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: MoRAConfig) -> dict[str, ParamSpec]:
        q = min(int(math.sqrt((d_in + d_out) * cfg.r) + 0.5), d_in)
        q -= q % 2 if cfg.chunks == "rotated" else 0
        return {"lora_M": ParamSpec((q, q))}

    @staticmethod
    def forward(layer: Layer[MoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        M, x = layer.lora_M, layer.dropout(x)
        q, d_in, d_out = len(M), x.shape[-1], y.shape[-1]
        n = -(-d_in // q)
        if layer.cfg.chunks == "summed":
            pieces: Tensor = filled(x, n * q).unflatten(-1, (n, q))
            z = pieces.sum(-2) @ M.mT
        else:
            n = min(n, -(-d_out // q))
            turned = layer.once("turned", lambda: rotated(layer.tiny("lora_M"), n).to(y.dtype))
            rows = filled(x, n * q).reshape(-1, n, q).transpose(0, 1)
            z = (rows @ turned.mT).transpose(0, 1).reshape(*x.shape[:-1], n * q)
        return y + z.repeat(*(1 for _ in x.shape[1:]), -(-d_out // z.shape[-1]))[..., :d_out]


def filled(x: Tensor, size: int) -> Tensor:
    """The first `size` inputs, or all and the first ones again."""
    d = x.shape[-1]
    return x[..., :size] if size <= d else torch.cat((x, x[..., : size - d]), -1)


def rotated(M: Tensor, n: int) -> Tensor:
    """M R_i for the places i < n, (n, q, q); R_i turns input j with input j + q/2 by the angle i 10000^(−2j/q)."""
    q = len(M)
    angles = torch.arange(n).to(M)[:, None] * 10000 ** (-torch.arange(0, q, 2).to(M) / q)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    left, right = M.chunk(2, 1)
    return torch.cat((left * cos + right * sin, right * cos - left * sin), -1)
