"""BD-LoRA: LoRA with one block-diagonal factor, for servers that shard the layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import lowrank_update
from ..ops.transforms import block_diag
from ._lowrank import ScaledConfig


@dataclass(frozen=True, kw_only=True)
class BDLoRAConfig(ScaledConfig):
    variant: str = "bd_lora"
    blocks: int = 2
    """n, the number of shards; divides r and the width of the block-diagonal factor."""
    side: Literal["A", "B", "role"] = "role"
    """The block-diagonal factor: A where the inputs are sharded, B where the outputs are; "role": A on writers of the
    residual stream (o_proj, down_proj), B elsewhere."""

    def validate(self) -> None:
        super().validate()
        if self.blocks < 1 or self.r % self.blocks:
            raise ConfigError(
                f"BDLoRAConfig.blocks must divide the rank: r={self.r} is no multiple of blocks={self.blocks}; set "
                "r to one, or blocks=1."
            )

    def for_target(self, path: str, role: str | None = None) -> BDLoRAConfig:
        found = super().for_target(path, role)
        assert isinstance(found, BDLoRAConfig)
        return dataclasses.replace(found, side="A" if role == "writer" else "B") if self.side == "role" else found


@register
class BDLoRA(Variant):
    """Block-diagonal low-rank update: each shard of a tensor-parallel layer has ranks of its own and needs no other's.

    y' = y + s (x Aᵀ) Bᵀ, A (r, d_in) or B (d_out, r) block-diagonal with n blocks, stored without its zeros: A (r,
    d_in/n) ~ U(±1/√(d_in/n)), or B (d_out, r/n) = 0. An exact zero is added at the start. s = alpha/r, or alpha/√r with
    `use_rslora`. r(d_in/n + d_out) or r(d_in + d_out/n) parameters. Here the small factor is written out and multiplied
    whole; the gain is a server's. PEFT finds the sides by names and draws a block-diagonal A √6 times as large. r(d_in
    + d_out) multiply-adds per token. Wang et al. 2025, Block-Diagonal LoRA for Eliminating Communication Overhead in
    Tensor Parallel LoRA Serving, arXiv 2510.23346.
    """

    name = "bd_lora"
    config = BDLoRAConfig
    paper = "2510.23346"
    family = "low rank"
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: BDLoRAConfig) -> dict[str, ParamSpec]:
        n, d = cfg.blocks, d_in if cfg.side == "A" else d_out
        if d % n:
            raise ConfigError(f"blocks={n} does not divide the {d} features of a {d_in}->{d_out} layer on side A or B.")
        return {
            "lora_A": ParamSpec((cfg.r, d_in // n if cfg.side == "A" else d_in), init="kaiming"),
            "lora_B": ParamSpec((d_out, cfg.r if cfg.side == "A" else cfg.r // n)),
        }

    @staticmethod
    def forward(layer: Layer[BDLoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        A, B = layer.once("factors", lambda: written_out(layer))
        return lowrank_update(y, layer.dropout(x), A, B, layer.cfg.scale)

    @staticmethod
    def factors(layer: Layer[BDLoRAConfig]) -> tuple[Tensor, Tensor]:
        A, B = written_out(layer)
        return A, layer.cfg.scale * B


def written_out(layer: Layer[BDLoRAConfig]) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r), zeros included."""
    A, B, n = layer.lora_A, layer.lora_B, layer.cfg.blocks
    if layer.cfg.side == "A":
        return block_diag(A.chunk(n)), B
    return A, block_diag(B.chunk(n))
