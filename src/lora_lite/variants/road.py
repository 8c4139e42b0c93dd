"""ROAD: scaled rotations of pairs of outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.orthogonal import mix_pairs, pair_layout

ROWS = {1: (0, 0, 0, 0), 2: (0, 0, 1, 1), 4: (0, 1, 2, 3)}
"""Which of a pair's (α, θ) each entry of [[α cosθ, −α sinθ], [α sinθ, α cosθ]] takes, row by row."""


@dataclass(frozen=True, kw_only=True)
class RoadConfig(AdapterConfig):
    variant: str = "road"
    per_pair: Literal[1, 2, 4] = 1
    """Number of (α, θ) of each pair: ROAD-1 shares one, ROAD-2 has one per row of the 2x2 matrix, ROAD-4 one per
    entry."""
    group_size: int = 64
    """Partners lie half a group apart: 64 pairs outputs i and i + 32 of each group, as PEFT does; 2 pairs neighbours,
    as the paper does."""

    def validate(self) -> None:
        super().validate()
        if self.group_size < 2 or self.group_size % 2:
            raise ConfigError(f"RoadConfig.group_size must be even and at least 2, got {self.group_size}.")


@register
class ROAD(Variant):
    """2-D rotary adaptation: every pair of outputs, bias included, is rotated by θ and scaled by α.

    (y1, y2) → (α cosθ y1 − α sinθ y2, α sinθ y1 + α cosθ y2). Trained: a = α − 1 and θ, (k, ⌈d_out/2⌉) each, both 0. As
    a change of y: α cosθ − 1 = a cosθ − 2 sin²(θ/2), which is zero at the start and loses nothing later. k d_out
    parameters for even d_out. A group that is left at the end is smaller; the middle one of an odd number of outputs is
    scaled by α cosθ alone. PEFT trains α itself and needs d_out to be a multiple of the group. The authors published no
    code; that the bias is rotated too, and partners half a group apart, follow PEFT, where the paper pairs neighbours
    of Wx. Liao, Monz 2024, 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability,
    arXiv 2409.00119.
    """

    name = "road"
    config = RoadConfig
    paper = "2409.00119"
    family = "rotations and reflections"
    ignores = ("r", "alpha", "dropout")
    lr = 3e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: RoadConfig) -> dict[str, ParamSpec]:
        shape = (cfg.per_pair, (d_out + 1) // 2)
        return {"lora_theta": ParamSpec(shape, decay=False), "lora_alpha": ParamSpec(shape, decay=False)}

    @staticmethod
    def by_feature(layer: Layer[RoadConfig], side: str) -> tuple[Tensor, ...] | None:
        return pair_map(layer) if side == "output" else None

    @staticmethod
    def act(cfg: RoadConfig, v: Tensor, c: Tensor, s: Tensor) -> Tensor:
        return mix_pairs(v, c, s, cfg.group_size)

    @staticmethod
    def forward(layer: Layer[RoadConfig], x: Tensor, y: Tensor) -> Tensor:
        c, s = pair_map(layer)
        return mix_pairs(y, c.to(y.dtype), s.to(y.dtype), layer.cfg.group_size)


def pair_map(layer: Layer[RoadConfig]) -> tuple[Tensor, Tensor]:
    """What every output takes of itself beyond 1, and of its partner, (d_out,) each."""

    def compute() -> tuple[Tensor, Tensor]:
        d, group = layer.out_features, layer.cfg.group_size
        a, theta = layer.tiny("lora_alpha"), layer.tiny("lora_theta")
        cos, sin = a * theta.cos() - 2 * (theta / 2).sin() ** 2, (1 + a) * theta.sin()
        c1, s1, s2, c2 = ROWS[layer.cfg.per_pair]
        return pair_layout(cos[c1], cos[c2], d, group), pair_layout(-sin[s1], sin[s2], d, group)

    return layer.once("map", compute)
