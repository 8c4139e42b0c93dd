"""BOFT: rotations of the input as a product of sparse butterfly factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import scale_outputs
from ..ops.orthogonal import add_blocks, add_butterfly, cayley_minus_identity, skew


@dataclass(frozen=True, kw_only=True)
class BOFTConfig(AdapterConfig):
    variant: str = "boft"
    block_size: int = 4
    """Width b of the blocks, even."""
    n_factors: int = 2
    """m: factor i joins inputs 2^(i−1) b apart, so b·2^(m−1) inputs mix. Factors that do not fit into a narrow layer
    are left out."""

    def validate(self) -> None:
        super().validate()
        if self.block_size < 2 or self.block_size % 2:
            raise ConfigError(f"BOFTConfig.block_size must be even and at least 2, got {self.block_size}.")
        if not 1 <= self.n_factors <= 30:
            raise ConfigError(f"BOFTConfig.n_factors must be between 1 and 30, got {self.n_factors}.")


@register
class BOFT(Variant):
    """Orthogonal butterfly finetuning: x' = x B_m ⋯ B_1, and y' = y + s ∘ (y − bias).

    Each B_i = P_i blockdiag(R_1 … R_n) P_iᵀ is orthogonal: block c of a segment of 2^(i−1) blocks acts on its
    half-blocks c and c + 2^(i−1). R = (I + Q)(I − Q)⁻¹, computed as x + x (R − I), from the trained upper triangle of
    Q: lora_Q1 … lora_Qm (n, b(b−1)/2) = 0; gains s (d_out) = 0. An exact zero is added at the start. About m d_in
    (b−1)/2 + d_out parameters; with b log(d/b) of them B can reach every input from every other. Inputs that fill no
    whole segment stay out of that factor, and what is left of B_1 is a smaller block (lora_tail). PEFT trains X with Q
    = −(X − Xᵀ)/2 and 1 + s, multiplies dense d x d matrices, and does one factor only where its CUDA extension is
    missing. Liu et al. 2023, Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, arXiv 2311.06243.
    m b d_in + d_out multiply-adds per token.
    """

    name = "boft"
    config = BOFTConfig
    paper = "2311.06243"
    family = "rotations and reflections"
    ignores = ("r", "alpha", "dropout")
    lr = 5e-4

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: BOFTConfig) -> dict[str, ParamSpec]:
        specs = {"lora_s": ParamSpec((d_out,), decay=False)}
        b, t = cfg.block_size, d_in % cfg.block_size
        for i, n in enumerate(blocks(d_in, cfg), 1):
            specs[f"lora_Q{i}"] = ParamSpec((n, b * (b - 1) // 2), decay=False)
        if t > 1:
            specs["lora_tail"] = ParamSpec((1, t * (t - 1) // 2), decay=False)
        return specs

    @staticmethod
    def forward_input(layer: Layer[BOFTConfig], x: Tensor) -> Tensor:
        b, d = layer.cfg.block_size, x.shape[-1]
        counts = blocks(d, layer.cfg)
        if counts:
            names = [f"lora_Q{i}" for i in range(1, len(counts) + 1)]
            factors = torch.split(layer.once("turns", lambda: turns(layer, names, b)).to(x.dtype), counts)
            for i in reversed(range(len(counts))):
                w = counts[i] * b
                turned = add_butterfly(x[..., :w], factors[i], i)
                x = turned if w == d else torch.cat((turned, x[..., w:]), -1)
        t = d % b
        if t > 1:
            tail = add_blocks(x[..., d - t :], layer.once("tail", lambda: turns(layer, ["lora_tail"], t)).to(x.dtype))
            x = torch.cat((x[..., : d - t], tail), -1)
        return x

    @staticmethod
    def forward(layer: Layer[BOFTConfig], x: Tensor, y: Tensor) -> Tensor:
        return scale_outputs(y, layer.lora_s, layer.bias)


def blocks(d: int, cfg: BOFTConfig) -> list[int]:
    """Number of blocks of each factor."""
    counts = [d // (cfg.block_size << i) << i for i in range(cfg.n_factors)]
    return [n for n in counts if n]


def turns(layer: Layer[BOFTConfig], names: list[str], b: int) -> Tensor:
    """R − I of all blocks of these factors, (n, b, b)."""
    return cayley_minus_identity(skew(torch.cat([layer.tiny(name) for name in names]), b))
