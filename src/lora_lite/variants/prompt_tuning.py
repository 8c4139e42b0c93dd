"""Prompt tuning: trained embeddings before the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import Layer, ParamSpec, Variant, register
from ._prompt import PromptConfig, words


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(PromptConfig):
    variant: str = "prompt_tuning"


@register
class PromptTuning(Variant):
    """r virtual tokens before the text, whose embeddings are all that is trained.

    model(x) = model([P; E x]) at the text's positions, P (r, d) trained: it starts as the embeddings of `start_tokens`
    or of random tokens (the paper's "sampled vocabulary"). The r tokens run through the model once per call, or once
    per generation, and stay as keys and values of each layer: PEFT puts them into the sequence, and returns logits for
    them too. Their rows in a padded batch stand directly before the text, after PEFT's choice before the padding;
    positions count from r. r·d parameters in all. Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt
    Tuning, arXiv 2104.08691; the paper's rate is 0.3 with Adafactor."""

    name = "prompt_tuning"
    config = PromptTuningConfig
    paper = "2104.08691"
    family = "before the text"
    site = "attention"
    affine = False
    identity_bound = torch.inf
    ignores = ("alpha", "dropout")
    lr = 1e-2

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: PromptTuningConfig) -> dict[str, ParamSpec]:
        return {}

    @staticmethod
    def shared_specs(targets: Any, cfg: PromptTuningConfig) -> dict[str, ParamSpec]:
        return {"lora_P": ParamSpec((cfg.r, targets[0].d_in), decay=False)}

    @staticmethod
    def group_init(model: Any, targets: Any, cfg: PromptTuningConfig, data: Any) -> None:
        targets[0].lora_P = words(model, targets, cfg)

    @staticmethod
    def tokens(layer: Layer[PromptTuningConfig]) -> Tensor:
        return layer.lora_P
