"""Prefix tuning: trained keys and values before those of the text, in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import Layer, ParamSpec, Variant, register
from ._prompt import PrefixConfig


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(PrefixConfig):
    variant: str = "prefix_tuning"


@register
class PrefixTuning(Variant):
    """r trained keys and values in every attention, which all queries see before those of the text.

    y = softmax(q [K_P; K]ᵀ / √h) [V_P; V], K_P and V_P (r, d_kv) trained per layer, as they stand: keys get no
    position, and the text's positions begin at r. They start as keys and values of the first r tokens of
    `calibration_data`, which learns far better, or without data from N(0, 1) as PEFT's do. The paper trains an MLP that
    makes them and throws it away; PEFT has that as an option, this page does not. The prefix is no part of the
    key-value cache, so cached generation equals the uncached forward; PEFT 0.21.2 generates as the bare base. 2·r·d_kv
    parameters per layer. Li and Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation, arXiv
    2101.00190."""

    name = "prefix_tuning"
    config = PrefixTuningConfig
    paper = "2101.00190"
    family = "before the text"
    also = {"P-tuning v2": ""}
    site = "attention"
    affine = False
    identity_bound = torch.inf
    ignores = ("alpha", "dropout")
    lr = 5e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: PrefixTuningConfig) -> dict[str, ParamSpec]:
        spec = ParamSpec((cfg.r, d_out), init="normal", decay=False)
        return {"lora_K": spec, "lora_V": spec}

    @staticmethod
    def group_init(model: Any, targets: Any, cfg: PrefixTuningConfig, data: Any) -> None:
        if data is not None:
            for layer, K, V in targets.remembered(data, cfg.r):
                layer.lora_K, layer.lora_V = K, V

    @staticmethod
    def prefix(layer: Layer[PrefixTuningConfig]) -> tuple[Tensor, Tensor]:
        return layer.lora_K, layer.lora_V
