"""Lily: factors that neighbouring layers share, and a router of each layer that mixes the outer ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import add_lowrank, shrink
from ._lowrank import ScaledConfig


@dataclass(frozen=True, kw_only=True)
class LilyConfig(ScaledConfig):
    variant: str = "lily"
    r: int = 32
    stride: int = 1
    """So many neighbouring layers of one name share an A."""
    experts: int = 2
    """Number of B's, which all layers of one name share."""

    def validate(self) -> None:
        super().validate()
        if self.stride < 1 or self.experts < 2:
            raise ConfigError(
                f"LilyConfig: stride={self.stride} begins at 1, experts={self.experts} at 2, since one needs no router."
            )


@register
class Lily(Variant):
    """Low-rank interconnected adaptation: A is shared by neighbours, several B's by all layers of one name and shape.

    z = A drop(x), p = softmax(R z), y' = y + s Σ_e p_e B_e z, with R (E, r) of each layer, A (r, d_in) of `stride`
    layers, B (E, d_out, r) = 0 of all, s = alpha/r. The router works token by token: the authors and PEFT average p
    over all tokens of the batch, so that one row, or a later token, changes another. r(d_in + E d_out)/n + E r
    parameters per layer, r(d_in + E d_out) multiply-adds. Zhong et al. 2024, Low-Rank Interconnected Adaptation across
    Layers, arXiv 2407.09946."""

    name = "lily"
    config = LilyConfig
    paper = "2407.09946"
    family = "mixtures and tasks"
    affine = False
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: LilyConfig) -> dict[str, ParamSpec]:
        return {"lora_R": ParamSpec((cfg.experts, cfg.r), init="kaiming")}

    @staticmethod
    def shared_specs(targets: Any, cfg: LilyConfig) -> list[tuple[list[Any], dict[str, ParamSpec]]]:
        names: dict[tuple[Any, ...], list[Any]] = {}
        for t in targets:
            names.setdefault((t.path.rsplit(".", 1)[-1], t.d_in, t.d_out, t.cfg.r), []).append(t)
        found: list[tuple[list[Any], dict[str, ParamSpec]]] = []
        for (_, d_in, d_out, r), group in names.items():
            found.append((group, {"lora_B": ParamSpec((cfg.experts, d_out, r))}))
            for i in range(0, len(group), cfg.stride):
                found.append((group[i : i + cfg.stride], {"lora_A": ParamSpec((r, d_in), init="kaiming")}))
        return found

    @staticmethod
    def forward(layer: Layer[LilyConfig], x: Tensor, y: Tensor) -> Tensor:
        z = shrink(layer.dropout(x), layer.lora_A).mT  # (r, tokens), as the thin products are quickest on a CPU
        p = (layer.lora_R @ z).softmax(0)
        mixed = (p[:, None] * z).flatten(0, 1)
        B = layer.once("B", lambda: layer.lora_B.transpose(0, 1).flatten(1))
        return add_lowrank(y, mixed.mT, B, layer.cfg.scale)
