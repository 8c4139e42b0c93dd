"""ETHER: one reflection of the input per block, at a fixed distance from the identity."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import lowrank_update
from ..ops.orthogonal import block_rows, unit_rows


@dataclass(frozen=True, kw_only=True)
class ETHERConfig(AdapterConfig):
    variant: str = "ether"
    n_blocks: int = 1
    """Number of diagonal blocks, each with its own reflection; must divide d_in."""

    def validate(self) -> None:
        super().validate()
        if self.n_blocks < 1:
            raise ConfigError(f"ETHERConfig.n_blocks must be at least 1, got {self.n_blocks}.")


@register
class ETHER(Variant):
    """Hyperplane reflections: x' = x H, H = blockdiag(I − 2 û_1 û_1ᵀ, …, I − 2 û_n û_nᵀ).

    lora_u (n, d_in/n) ~ U(±√(n/d_in)), so ‖u_i‖ is 0.58 at any width, as the authors start: only û counts, and a step
    turns it by 1.7 lr √(d_in/n). A departure: no reflection is near the identity, ‖H − I‖ is 2√n whatever û, so a fresh
    adapter changes the output (ETHER+ does not), and the learning rate cannot change how far training goes. In exchange
    nothing has to be tuned. d_in parameters. The published code mixes rows where n > 1; this is the block-diagonal H of
    the paper. Bini et al. 2024, ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections, arXiv
    2405.20271.
    2n d_in multiply-adds per token.
    """

    name = "ether"
    config = ETHERConfig
    paper = "2405.20271"
    family = "rotations and reflections"
    ignores = ("r", "alpha", "dropout")
    identity_bound = math.inf
    lr = 3e-3
    width_growth = 0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: ETHERConfig) -> dict[str, ParamSpec]:
        if d_in % cfg.n_blocks:
            raise ConfigError(f"n_blocks={cfg.n_blocks} does not divide the {d_in} inputs.")
        return {"lora_u": ParamSpec((cfg.n_blocks, d_in // cfg.n_blocks), init="kaiming", decay=False)}

    @staticmethod
    def forward_input(layer: Layer[ETHERConfig], x: Tensor) -> Tensor:
        u = block_rows(unit_rows(layer.tiny("lora_u"))).to(x.dtype)
        return lowrank_update(x, x, u, -2 * u.mT)
