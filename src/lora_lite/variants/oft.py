"""OFT: block-diagonal rotations of the input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.orthogonal import add_blocks, cayley_minus_identity, neumann_minus_identity, shorten, skew


@dataclass(frozen=True, kw_only=True)
class OFTConfig(AdapterConfig):
    variant: str = "oft"
    block_size: int = 32
    """Width b of the blocks; what is left at the end is a smaller block."""
    neumann_terms: int = 0
    """0: the exact Cayley map. k >= 3: the truncated series of OFTv2 with k terms, orthogonal only while the rotation
    is small."""
    max_norm: float | None = None
    """COFT: the largest ‖Q‖ of a block (Frobenius) that can act; longer ones act as if cut to it. None: no bound."""

    def validate(self) -> None:
        super().validate()
        if self.block_size < 2:
            raise ConfigError(f"OFTConfig.block_size must be at least 2, got {self.block_size}.")
        if self.neumann_terms and self.neumann_terms < 3:
            raise ConfigError(f"OFTConfig.neumann_terms must be 0 (exact) or at least 3, got {self.neumann_terms}.")
        if self.max_norm is not None and not self.max_norm > 0:
            raise ConfigError(f"OFTConfig.max_norm must be positive, got {self.max_norm}.")


@register
class OFT(Variant):
    """Orthogonal finetuning: x' = x R, R = blockdiag(R_1 … R_n) with rotations R_i (b, b), and y = x' Wᵀ + bias.

    R_i = (I + Q_i)(I − Q_i)⁻¹ with skew Q_i, whose upper triangle is trained, from 0: lora_Q (n, b(b−1)/2), and
    lora_tail (1, t(t−1)/2) for the t = d_in mod b inputs left. Computed as x + x·blockdiag(R − I), R − I = 2(I − Q)⁻¹Q:
    an exact zero at the start. d_in (b−1)/2 parameters. The inputs are rotated, not the weight (OFTv2), so quantised
    bases work; norms of x, hence of the rows of W, are kept to rounding. PEFT's exact mode turns the other way for the
    same numbers and its default is the series; its COFT rewrites the parameters in forward, and it moves block sizes
    that do not divide d_in to ones that do. Qiu et al. 2023, Controlling Text-to-Image Diffusion by Orthogonal
    Finetuning, arXiv 2306.07280; Qiu et al. 2025, OFTv2, arXiv 2506.19847.
    b d_in multiply-adds per token.
    """

    name = "oft"
    config = OFTConfig
    paper = "2306.07280"
    family = "rotations and reflections"
    also = {"Diag-OFT": ""}
    ignores = ("r", "alpha", "dropout")
    lr = 4e-4

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: OFTConfig) -> dict[str, ParamSpec]:
        n, t = divmod(d_in, cfg.block_size)
        specs: dict[str, ParamSpec] = {}
        if n:
            specs["lora_Q"] = ParamSpec((n, cfg.block_size * (cfg.block_size - 1) // 2), decay=False)
        if t > 1:
            specs["lora_tail"] = ParamSpec((1, t * (t - 1) // 2), decay=False)
        if not specs:
            raise ConfigError("a single input has nothing to rotate; leave this layer out with exclude_names.")
        return specs

    @staticmethod
    def forward_input(layer: Layer[OFTConfig], x: Tensor) -> Tensor:
        b, d = layer.cfg.block_size, x.shape[-1]
        t = d % b
        if not t:
            return add_blocks(x, turns(layer, "lora_Q", b, x.dtype))
        head, tail = x[..., : d - t], x[..., d - t :]
        if d > t:
            head = add_blocks(head, turns(layer, "lora_Q", b, x.dtype))
        if t > 1:
            tail = add_blocks(tail, turns(layer, "lora_tail", t, x.dtype))
        return torch.cat((head, tail), -1)


def turns(layer: Layer[OFTConfig], name: str, b: int, dtype: torch.dtype) -> Tensor:
    """R − I of all blocks, (n, b, b)."""
    return layer.once(name, lambda: turn(layer.cfg, layer.tiny(name), b).to(dtype))


def turn(cfg: OFTConfig, theta: Tensor, b: int) -> Tensor:
    if cfg.max_norm is not None:
        theta = shorten(theta, cfg.max_norm / 2**0.5)  # ‖Q‖² counts every angle twice
    Q = skew(theta, b)
    return neumann_minus_identity(Q, cfg.neumann_terms) if cfg.neumann_terms else cayley_minus_identity(Q)
