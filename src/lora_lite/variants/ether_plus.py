"""ETHER+: a relaxed reflection on both sides of the weight, at most 2 from the identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import lowrank_update
from ..ops.orthogonal import block_rows, unit_pair


@dataclass(frozen=True, kw_only=True)
class ETHERPlusConfig(AdapterConfig):
    variant: str = "ether_plus"
    n_blocks: int = 1
    """Number of diagonal blocks; must divide d_in, and d_out where the output is transformed."""
    sides: Literal["both", "input"] = "both"
    """Transform inputs and outputs, as in the paper, or inputs only."""

    def validate(self) -> None:
        super().validate()
        if self.n_blocks < 1:
            raise ConfigError(f"ETHERPlusConfig.n_blocks must be at least 1, got {self.n_blocks}.")


@register
class ETHERPlus(Variant):
    """W' = H' W H with blocks I − û ûᵀ + v̂ v̂ᵀ in H (d_in) and H' (d_out); the bias stays as it is.

    û and v̂ start equal, so the two terms cancel: u = u0 + Δu, v = u0 + Δv, u0 (n, d/n) ~ U(±√(n/d)) frozen and saved,
    Δu = Δv = 0 trained; ‖u0‖ is 0.58 at any width, as the authors start, and a step turns û by 1.7 lr √(d/n). With e =
    v̂ − û, −ûûᵀ + v̂v̂ᵀ = û eᵀ + e v̂ᵀ: an exact zero is added at the start, and the gradient of e is not zero. A block
    moves by at most 2 in the Frobenius norm, however long training goes. 2 (d_in + d_out) parameters. The published
    code mixes rows where n > 1; this is the block-diagonal H of the paper. Bini et al. 2024, ETHER: Efficient
    Finetuning of Large-Scale Models with Hyperplane Reflections, arXiv 2405.20271.
    4n (d_in + d_out) multiply-adds per token.
    """

    name = "ether_plus"
    config = ETHERPlusConfig
    paper = "2405.20271"
    family = "rotations and reflections"
    ignores = ("r", "alpha", "dropout")
    lr = 3e-3
    width_growth = 0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: ETHERPlusConfig) -> dict[str, ParamSpec]:
        specs: dict[str, ParamSpec] = {}
        for side, d in (("in", d_in), ("out", d_out))[: 2 if cfg.sides == "both" else 1]:
            if d % cfg.n_blocks:
                raise ConfigError(f"n_blocks={cfg.n_blocks} does not divide the {d} {side}puts.")
            shape = (cfg.n_blocks, d // cfg.n_blocks)
            specs[f"lora_{side}_u"] = specs[f"lora_{side}_v"] = ParamSpec(shape, decay=False)
            specs[f"lora_{side}_u0"] = ParamSpec(shape, init="kaiming", as_buffer=True)
        return specs

    @staticmethod
    def forward_input(layer: Layer[ETHERPlusConfig], x: Tensor) -> Tensor:
        Z, M = layer.once("in", lambda: change(layer, "in", x.dtype))
        return lowrank_update(x, x, Z, M)

    @staticmethod
    def forward(layer: Layer[ETHERPlusConfig], x: Tensor, y: Tensor) -> Tensor:
        if layer.cfg.sides == "input":
            return y
        Z, M = layer.once("out", lambda: change(layer, "out", y.dtype))
        return lowrank_update(y, y if layer.bias is None else y - layer.bias, Z, M)


def change(layer: Layer[ETHERPlusConfig], side: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Z (2n, d) and M (d, 2n) with H − I = Zᵀ Mᵀ."""
    u, v = layer.tiny(f"lora_{side}_u"), layer.tiny(f"lora_{side}_v")
    unit, e = unit_pair(layer.tiny(f"lora_{side}_u0") + u, v - u)
    Z = torch.cat((block_rows(unit), block_rows(e)))
    M = torch.cat((block_rows(e), block_rows(unit + e)))
    return Z.to(dtype), M.to(dtype).mT
