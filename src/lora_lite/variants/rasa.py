"""RaSA: LoRA whose layers pool some of their ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import add_lowrank, shrink
from ._shared import groups, sort_of


@dataclass(frozen=True, kw_only=True)
class RaSAConfig(AdapterConfig):
    variant: str = "rasa"
    pooled: int = 1
    """k, the ranks that each layer gives to the pool; below r."""


@register
class RaSA(Variant):
    """Rank-sharing low-rank update: the same layer of all blocks gives k of its r ranks to a pool that all of them use.

    y' = y + (drop(x) [A; A_s]ᵀ ∘ m) [B, B_s]ᵀ with the layer's own A (r − k, d_in) and B (d_out, r − k), and the pool's
    A_s (kL, d_in) and B_s (d_out, kL) of L layers. A's ~ U(±1/√d_in), B's = 0: an exact zero at the start. Each layer
    has its own m = c ∘ (1 + δ), δ = 0 trained, c = alpha/2 over the number of ranks of either part (the authors train m
    itself). As many parameters as LoRA and r − k + kL more; rank r − k + kL. He et al. 2025, RaSA: Rank-Sharing
    Low-Rank Adaptation, arXiv 2503.12576.
    (r − k + kL)(d_in + d_out) multiply-adds per token.
    """

    name = "rasa"
    config = RaSAConfig
    paper = "2503.12576"
    family = "low rank"
    lr = 5e-4

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: RaSAConfig) -> dict[str, ParamSpec]:
        own = cfg.r - cfg.pooled
        if cfg.pooled < 1 or own < 1:
            raise ConfigError(f"pooled={cfg.pooled} must be at least 1 and leave a rank of r = {cfg.r}.")
        return {"lora_A": ParamSpec((own, d_in), init="kaiming"), "lora_B": ParamSpec((d_out, own))}

    @staticmethod
    def shared_specs(targets: Any, cfg: RaSAConfig) -> list[tuple[list[Any], dict[str, ParamSpec]]]:
        found: list[tuple[list[Any], dict[str, ParamSpec]]] = []
        for some in groups(targets, sort_of):
            pool, (_, d_in, d_out) = sum(t.cfg.pooled for t in some), sort_of(some[0])
            specs = {"lora_pool_A": ParamSpec((pool, d_in), init="kaiming"), "lora_pool_B": ParamSpec((d_out, pool))}
            found.append((some, specs))
            found += [([t], {"lora_mix": ParamSpec((t.cfg.r - t.cfg.pooled + pool,), decay=False)}) for t in some]
        return found

    @staticmethod
    def forward(layer: Layer[RaSAConfig], x: Tensor, y: Tensor) -> Tensor:
        A = torch.cat((layer.lora_A, layer.lora_pool_A))
        return add_lowrank(y, shrink(layer.dropout(x), A), mixed(layer))

    @staticmethod
    def factors(layer: Layer[RaSAConfig]) -> tuple[Tensor, Tensor]:
        return torch.cat((layer.lora_A, layer.lora_pool_A)), mixed(layer)


def mixed(layer: Layer[RaSAConfig]) -> Tensor:
    """[B, B_s] diag(m), (d_out, ranks)."""
    own, gain, half = layer.lora_A.shape[0], 1 + layer.lora_mix, layer.cfg.effective_alpha / 2
    pool = len(gain) - own
    return torch.cat((layer.lora_B * (gain[:own] * (half / own)), layer.lora_pool_B * (gain[own:] * (half / pool))), 1)
