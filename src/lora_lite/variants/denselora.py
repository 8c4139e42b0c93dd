"""DenseLoRA: layers of one name share what narrows and widens; each has a small dense core between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..core import Layer, ParamSpec, Variant, register
from ..ops.lowrank import shrink
from ._lowrank import ScaledConfig


@dataclass(frozen=True, kw_only=True)
class DenseLoRAConfig(ScaledConfig):
    variant: str = "denselora"
    r: int = 16


@register
class DenseLoRA(Variant):
    """Dense low-rank adaptation: an encoder and a decoder that all layers of one name share, around a dense core.

    y' = y + s g(D M g(E drop(x))), g the GELU, E (r, d_in) ~ U(±1/√d_in) and D (d_out, r) = 0 of all layers of one name
    and shape, M (r, r) ~ U(±1/√r) of each; an exact zero is added at the start. s = alpha/r, or alpha/√r with
    `use_rslora`. The authors' code drops three times in a row; here x alone is dropped. Not affine, so it stays beside
    the weight. r² parameters per layer and r(d_in + d_out) per name; r(d_in + d_out + r) multiply-adds per token. Mu et
    al. 2025, DenseLoRA: Dense Low-Rank Adaptation of Large Language Models, arXiv 2505.23808."""

    name = "denselora"
    config = DenseLoRAConfig
    paper = "2505.23808"
    family = "low rank"
    affine = False
    lr = 3e-4

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: DenseLoRAConfig) -> dict[str, ParamSpec]:
        return {"lora_M": ParamSpec((cfg.r, cfg.r), init="kaiming")}

    @staticmethod
    def shared_specs(targets: Any, cfg: DenseLoRAConfig) -> list[tuple[list[Any], dict[str, ParamSpec]]]:
        names: dict[tuple[Any, ...], list[Any]] = {}
        for t in targets:
            names.setdefault((t.path.rsplit(".", 1)[-1], t.d_in, t.d_out, t.cfg.r), []).append(t)
        return [
            (group, {"lora_E": ParamSpec((r, d_in), init="kaiming"), "lora_D": ParamSpec((d_out, r))})
            for (_, d_in, d_out, r), group in names.items()
        ]

    @staticmethod
    def forward(layer: Layer[DenseLoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        z = F.gelu(shrink(layer.dropout(x), layer.lora_E)) @ layer.lora_M.mT
        return y + layer.cfg.scale * F.gelu(z @ layer.lora_D.mT).view(y.shape)
