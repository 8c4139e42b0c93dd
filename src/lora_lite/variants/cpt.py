"""CPT: the embeddings of a context before the text, moved within a small ball."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, Variant, register
from ._prompt import PromptConfig, words

MAX_RADIUS = 1e6
"""Beyond any embedding, and a number that float32 can hold times a width."""


@dataclass(frozen=True, kw_only=True)
class CPTConfig(PromptConfig):
    variant: str = "cpt"
    token_types: tuple[int, ...] = ()
    """What each token of the context is, as PEFT counts (mod 4): 1 template of an input, 2 input, 3 template of an
    output, 0 output. None: all are inputs."""
    epsilon: float = 0.1
    """Radius for inputs at width 2,048; it grows with √width."""
    format_epsilon: float = 0.1
    """Radius for templates; outputs stay as they are."""

    def validate(self) -> None:
        super().validate()
        if not all(0 < radius <= MAX_RADIUS for radius in (self.epsilon, self.format_epsilon)):
            raise ConfigError(
                f"CPTConfig: the radii {self.epsilon} and {self.format_epsilon} must lie above 0 and be at most "
                f"{MAX_RADIUS:g}."
            )
        if self.token_types and len(self.token_types) != self.r:
            raise ConfigError(f"CPTConfig.token_types speaks of {len(self.token_types)} tokens, and r is {self.r}.")


@register
class CPT(Variant):
    """Context-aware prompt tuning: examples in front of the text, whose embeddings may move a little.

    model(x) = model([P; E x]) at the text's positions, p_i = e_i + δ_i min(1, ε_i/‖δ_i‖) with the frozen embeddings e
    of the context `start_tokens` (r of them), δ (r, d) = 0 trained, ε_i the radius of the token's type times √(d/2048):
    a fresh adapter is in-context learning. The authors and PEFT write the projection into δ before each forward, so
    that a gradient that points outwards is not removed. Their loss also counts the context's own labels, with a weight
    that decays: here it is the caller's. r·d parameters in all. Blau et al. 2024, Context-aware Prompt Tuning:
    Advancing In-Context Learning with Adversarial Methods, arXiv 2410.17222."""

    name = "cpt"
    config = CPTConfig
    paper = "2410.17222"
    family = "before the text"
    site = "attention"
    affine = False
    identity_bound = torch.inf
    ignores = ("alpha", "dropout")
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: CPTConfig) -> dict[str, ParamSpec]:
        return {}

    @staticmethod
    def shared_specs(targets: Any, cfg: CPTConfig) -> dict[str, ParamSpec]:
        shape = (cfg.r, targets[0].d_in)
        return {"lora_P0": ParamSpec(shape, init="empty", as_buffer=True), "lora_D": ParamSpec(shape, decay=False)}

    @staticmethod
    def group_init(model: Any, targets: Any, cfg: CPTConfig, data: Any) -> None:
        targets[0].lora_P0 = words(model, targets, cfg)

    @staticmethod
    def tokens(layer: Layer[CPTConfig]) -> Tensor:
        cfg, D = layer.cfg, layer.tiny("lora_D")
        types = D.new_tensor(cfg.token_types or (2,) * cfg.r) % 4
        radius = torch.where(types == 2, cfg.epsilon, cfg.format_epsilon) * (types != 0) * math.sqrt(D.shape[1] / 2048)
        length = (D.square().sum(1) + 1e-30).sqrt()  # a root of 0 has no slope
        return layer.lora_P0 + (D * (radius / length).clamp_max(1)[:, None]).to(layer.lora_P0.dtype)
