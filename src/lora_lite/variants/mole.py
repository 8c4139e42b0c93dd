"""MoLE: trained adapters, weighed by a gate that reads their answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, register
from ._experts import ExpertsConfig, OfAdapters, expert_specs, mixed, narrowed


@dataclass(frozen=True, kw_only=True)
class MoLEConfig(ExpertsConfig):
    variant: str = "mole"
    balance: float = 0.0
    """Share in `ll.penalty` of −Σ_e log(mean gate of e), which keeps all experts in use."""

    def validate(self) -> None:
        super().validate()
        if self.balance < 0:
            raise ConfigError(f"MoLEConfig.balance must not be negative, got {self.balance}.")


@register
class MoLE(OfAdapters):
    """Mixture of trained LoRA experts: a gate in each layer weighs other adapters by what they answer.

    y' = y + Σ_e p_e h_e, h_e = B_e A_e drop(x), p = softmax(G ĥ / T) token by token, ĥ (E d_out) all the answers side
    by side, of mean square 1, over their number; G (E, E d_out) = 0 trained, so that it starts as the mean of the
    adapters. They are given as `[ll.factors(model, name) for name in names]` and copied. The answers are never built:
    scores and norm come from A_e x. The paper's gate reads all tokens of a fixed length at once, for a whole block, and
    trains T: here each token has its own, and G has T's part. E² d_out parameters, E r(d_in + d_out + E) multiply-adds.
    The rate is a guess, in units in which a step does not grow with the width. Not MoLoRA, LoRAMoE or MixLoRA, whose
    experts are trained with the router. Wu et al. 2024, Mixture of LoRA Experts, arXiv 2404.13628."""

    name = "mole"
    config = MoLEConfig
    paper = "2404.13628"
    family = "mixtures and tasks"
    affine = False
    lr = 1e-2

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: MoLEConfig) -> dict[str, ParamSpec]:
        return {**expert_specs(d_in, d_out, cfg), "lora_G": ParamSpec((cfg.experts, cfg.experts, d_out))}

    @staticmethod
    def forward(layer: Layer[MoLEConfig], x: Tensor, y: Tensor) -> Tensor:
        cfg, B, z = layer.cfg, layer.lora_B, narrowed(layer, x)
        GB = layer.once("GB", lambda: (layer.lora_G[:, :, None] @ layer.lora_B)[:, :, 0])  # (E, E, r)
        squares = ((z[..., None, :] @ (B.mT @ B))[..., 0, :] * z).sum((-2, -1))
        size = (squares / B.shape[:2].numel()).clamp_min(torch.finfo(y.dtype).tiny).sqrt()
        scores = z.flatten(-2) @ GB.flatten(1).mT / (size * B.shape[:2].numel())[..., None]
        p = (scores / cfg.temperature).softmax(-1)
        if cfg.balance and layer.training:
            layer.add_penalty(-cfg.balance * p.flatten(0, -2).mean(0).log().sum())
        return mixed(layer, y, z, p)
