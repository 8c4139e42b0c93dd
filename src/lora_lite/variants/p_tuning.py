"""P-tuning: virtual tokens before the text that a small network makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import linear

from ..core import ConfigError, Layer, ParamSpec, Variant, register
from ._prompt import OnePromptConfig


@dataclass(frozen=True, kw_only=True)
class PTuningConfig(OnePromptConfig):
    variant: str = "p_tuning"
    hidden: int = 0
    """Width h of the network; 0: that of the model."""

    def validate(self) -> None:
        super().validate()
        if self.hidden < 0:
            raise ConfigError(f"PTuningConfig.hidden is a width, or 0 for the model's, got {self.hidden}.")


@register
class PTuning(Variant):
    """Virtual tokens that an MLP makes of trained vectors: better conditioned than to train them as they stand.

    model(x) = model([P; E x]) at the text's positions, P = W_3 relu(W_2 relu(W_1 Z + b_1) + b_2) + b_3, Z (r, d) ~ N(0,
    1), weights and biases U(±1/√fan_in), all trained, one network for the model. The MLP form of PEFT and NeMo; the
    paper's has a bidirectional LSTM before two layers, which its code too replaces by an MLP. While generating the
    network runs once. The file holds the network, PEFT's only P. r·d + 2dh + h² + 2h + d parameters in all. Liu et al.
    2021, GPT Understands, Too, arXiv 2103.10385.
    """

    name = "p_tuning"
    config = PTuningConfig
    paper = "2103.10385"
    family = "before the text"
    site = "attention"
    affine = False
    identity_bound = torch.inf
    ignores = ("alpha", "dropout")
    lr = 1e-3
    width_growth = 1.0

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: PTuningConfig) -> dict[str, ParamSpec]:
        return {}

    @staticmethod
    def shared_specs(targets: Any, cfg: PTuningConfig) -> dict[str, ParamSpec]:
        d = targets[0].d_in
        h = cfg.hidden or d
        specs = {"lora_Z": ParamSpec((cfg.r, d), init="normal", decay=False)}
        for i, (n_in, n_out) in enumerate(((d, h), (h, h), (h, d)), 1):
            specs[f"lora_W{i}"] = ParamSpec((n_out, n_in), init="kaiming")
            specs[f"lora_b{i}"] = ParamSpec((n_out,), init=_uniform(n_in), decay=False)
        return specs

    @staticmethod
    def tokens(layer: Layer[PTuningConfig]) -> Tensor:
        z = linear(layer.lora_Z, layer.lora_W1, layer.lora_b1).relu()
        z = linear(z, layer.lora_W2, layer.lora_b2).relu()
        return linear(z, layer.lora_W3, layer.lora_b3)


def _uniform(fan_in: int) -> Any:
    def fill(t: Tensor, g: Generator) -> None:
        t.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=g)

    return fill
