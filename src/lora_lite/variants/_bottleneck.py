"""What the bottleneck adapters share: their options, and the middle between D and U."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import AdapterConfig, ParamSpec
from ..core.config import Role

Activation = Literal["relu", "gelu", "silu", "tanh"]
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


@dataclass(frozen=True, kw_only=True)
class BottleneckOptions(AdapterConfig):
    r: int = 64
    """Width of the bottleneck."""
    activation: Activation = "silu"
    """Between D and U: relu, gelu, silu or tanh."""
    learned_scale: bool = False
    """Train a factor 1 + g of every output channel (AdapterPlus)."""


@dataclass(frozen=True, kw_only=True)
class WriterOptions(BottleneckOptions):
    target_roles: tuple[Role, ...] | None = ("writer",)
    """Layers that write to the residual stream: the attention's and the feed-forward network's last ones."""


def bottleneck_specs(d_in: int, d_out: int, cfg: BottleneckOptions) -> dict[str, ParamSpec]:
    """D (r, d_in), c (r), U (d_out, r) = 0, e (d_out), and the gains where they are learned."""
    specs = {
        "lora_D": ParamSpec((cfg.r, d_in), init="kaiming"),
        "lora_c": ParamSpec((cfg.r,), decay=False),
        "lora_U": ParamSpec((d_out, cfg.r)),
        "lora_e": ParamSpec((d_out,), decay=False),
    }
    return specs | ({"lora_g": ParamSpec((d_out,), decay=False)} if cfg.learned_scale else {})


def through(layer: Any, h: Tensor) -> Tensor:
    """s (U f(D h + c) + e), times 1 + g where that is learned."""
    z = F.linear(layer.dropout(h), layer.lora_D, layer.lora_c)
    out = layer.cfg.scale * F.linear(ACTIVATIONS[layer.cfg.activation](z), layer.lora_U, layer.lora_e)
    return out * (1 + layer.lora_g) if layer.cfg.learned_scale else out
