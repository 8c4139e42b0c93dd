"""GOFT: a tree of Givens rotations of the input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.orthogonal import givens_tree


@dataclass(frozen=True, kw_only=True)
class GOFTConfig(AdapterConfig):
    variant: str = "goft"


@register
class GOFT(Variant):
    """Orthogonal adaptation by d_in − 1 Givens rotations in ⌈log2 d_in⌉ levels: x' = x G_1 G_2 ⋯, y = x' Wᵀ + bias.

    Level k rotates inputs 2^k m and 2^k m + 2^(k−1), m = 0, 1, …, by its own angles, all at once: (a, b) → (a cosθ − b
    sinθ, a sinθ + b cosθ). So input 0 ends up mixed with all others, which suffices to turn any one direction into any
    other. lora_theta (d_in − 1) = 0, and what is added to x is computed from cosθ − 1 = −2 sin²(θ/2): an exact zero at
    the start. Norms are kept to rounding. d_in − 1 parameters. The published code bounds θ by π tanh, trains a scale
    per input beside it unless told not to, and rotates neighbours at every level, where from the second level on its
    product is not orthogonal; this is the tree of the paper, angles alone. Ma et al. 2024, Parameter Efficient
    Quasi-Orthogonal Fine-Tuning via Givens Rotation, arXiv 2404.04316.
    4 d_in multiply-adds per token.
    """

    name = "goft"
    config = GOFTConfig
    paper = "2404.04316"
    family = "rotations and reflections"
    ignores = ("r", "alpha", "dropout")
    lr = 3e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: GOFTConfig) -> dict[str, ParamSpec]:
        if d_in < 2:
            raise ConfigError("a single input has nothing to rotate; leave this layer out with exclude_names.")
        return {"lora_theta": ParamSpec((d_in - 1,), decay=False)}

    @staticmethod
    def forward_input(layer: Layer[GOFTConfig], x: Tensor) -> Tensor:
        theta = layer.tiny("lora_theta")
        return givens_tree(x, (-2 * (theta / 2).sin() ** 2).to(x.dtype), theta.sin().to(x.dtype))
