"""Uni-LoRA: one short vector holds the factors of all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Targets, Variant, register
from ..ops.lowrank import lowrank_update
from ._shared import uniform


@dataclass(frozen=True, kw_only=True)
class UniLoRAConfig(AdapterConfig):
    variant: str = "unilora"
    r: int = 4
    length: int = 256
    """n, the number of trained numbers of the whole model."""

    def validate(self) -> None:
        super().validate()
        if self.length < 1:
            raise ConfigError(f"UniLoRAConfig.length must be at least 1, got {self.length}.")


@register
class UniLoRA(Variant):
    """One trained vector for the model, projected onto the factors of all layers by an isometry that is drawn once.

    y' = y + (drop(x) Aᵀ) Bᵀ, A (r, d_in), B (d_out, r): every entry is θ_i/√c_i for an i of its own, drawn and saved,
    c_i the number of entries of all layers with that i. θ (n) ~ U(±0.02) trained: n numbers in all. A departure by
    about 1e-3 at the start, as published. alpha is not used. Here each layer draws its own indices, so that they depend
    on the seed and its path alone; PEFT deals them out evenly, in the order of the layers. Li et al. 2025, Uni-LoRA:
    One Vector is All You Need, arXiv 2506.00799.
    r(d_in + d_out) multiply-adds per token.
    """

    name = "unilora"
    config = UniLoRAConfig
    paper = "2506.00799"
    family = "shared or random bases"
    ignores = ("alpha",)
    identity_bound = 1e-2
    lr = 5e-3
    width_growth = -0.25

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: UniLoRAConfig) -> dict[str, ParamSpec]:
        def fill(t: Tensor, g: Generator) -> None:
            t.copy_(torch.randint(cfg.length, t.shape, generator=g))

        shapes = {"lora_at_A": (cfg.r, d_in), "lora_at_B": (d_out, cfg.r)}
        return {k: ParamSpec(s, init=fill, as_buffer=True, dtype=torch.int32) for k, s in shapes.items()}

    @staticmethod
    def shared_specs(targets: Any, cfg: UniLoRAConfig) -> dict[str, ParamSpec]:
        return {
            "lora_theta": ParamSpec((cfg.length,), init=uniform(0.02), decay=False),
            "lora_unit": ParamSpec((cfg.length,), init="empty", as_buffer=True),
        }

    @staticmethod
    def group_init(model: nn.Module, targets: Targets[UniLoRAConfig], cfg: UniLoRAConfig, _: Any) -> None:
        if any(view.lora_at_A.is_meta for view in targets):
            return  # a model without values has nothing to count
        count = torch.zeros(cfg.length, dtype=torch.float64)
        for view in targets:
            for at in (view.lora_at_A, view.lora_at_B):
                count += torch.bincount(at.flatten().cpu().long(), minlength=cfg.length)
        for view in targets:
            view.lora_unit = count.clamp_min(1).rsqrt()

    @staticmethod
    def forward(layer: Layer[UniLoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        A, B = layer.once("factors", lambda: UniLoRA.factors(layer))
        return lowrank_update(y, layer.dropout(x), A, B)

    @staticmethod
    def factors(layer: Layer[UniLoRAConfig]) -> tuple[Tensor, Tensor]:
        theta = layer.lora_theta * layer.lora_unit
        return theta[layer.lora_at_A.long()], theta[layer.lora_at_B.long()]
