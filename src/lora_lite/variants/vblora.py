"""VB-LoRA: the factors of all layers are mixtures of the vectors of one bank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import lowrank_update
from ._shared import groups, uniform

LONGEST = 256
"""Length of the vectors that the authors choose."""


@dataclass(frozen=True, kw_only=True)
class VBLoRAConfig(AdapterConfig):
    variant: str = "vblora"
    r: int = 4
    vectors: int = 256
    """h, the number of vectors in the bank."""
    length: int | None = None
    """b, their length, which must divide all widths. None: the largest up to 256 that divides both widths of a layer;
    layers of another length have a bank of their own."""
    topk: int = 2
    """k, the number of vectors in a mixture."""

    def validate(self) -> None:
        super().validate()
        if self.length is not None and self.length < 1:
            raise ConfigError(f"VBLoRAConfig.length must be at least 1, got {self.length}.")
        if not 1 <= self.topk <= self.vectors:
            raise ConfigError(f"VBLoRAConfig.topk must lie between 1 and vectors={self.vectors}, got {self.topk}.")


@register
class VBLoRA(Variant):
    """Low-rank updates whose factors are divided into pieces, each a mixture of k vectors of a bank that layers share.

    y' = y + (drop(x) Aᵀ) Bᵀ; every piece of b numbers of a row of A, or of a column of B, is Σ softmax(top k of its
    logits) ∘ vectors. Bank (h, b) ~ U(±0.02), logits (h numbers per piece) ~ N(0, 0.1²), all trained, the bank at a
    tenth of the rate. A departure by about 1e-3 at the start, as published. alpha is not used. r(d_in + d_out) h/b
    numbers per layer in training, of which a choice of k lasts; h b in the bank. The mixtures are made in every call.
    Li et al. 2024, VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks, arXiv 2405.15179.
    r(d_in + d_out) multiply-adds per token.
    """

    name = "vblora"
    config = VBLoRAConfig
    paper = "2405.15179"
    family = "shared or random bases"
    ignores = ("alpha",)
    identity_bound = 1e-2
    lr = 1e-2
    width_growth = 0.75

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: VBLoRAConfig) -> dict[str, ParamSpec]:
        b = length_of(d_in, d_out, cfg)
        if d_in % b or d_out % b:
            raise ConfigError(f"length={b} does not divide a {d_in}->{d_out} layer; {math.gcd(d_in, d_out)} does.")
        return {
            "lora_logits_A": ParamSpec((cfg.r, d_in // b, cfg.vectors), init="normal:0.1", decay=False),
            "lora_logits_B": ParamSpec((d_out // b, cfg.r, cfg.vectors), init="normal:0.1", decay=False),
        }

    @staticmethod
    def shared_specs(targets: Any, cfg: VBLoRAConfig) -> list[tuple[list[Any], dict[str, ParamSpec]]]:
        found: list[tuple[list[Any], dict[str, ParamSpec]]] = []
        for some in groups(targets, lambda t: length_of(t.d_in, t.d_out, cfg)):
            shape = (cfg.vectors, length_of(some[0].d_in, some[0].d_out, cfg))
            found.append((some, {"lora_bank": ParamSpec(shape, init=uniform(0.02), decay=False, lr_ratio=0.1)}))
        return found

    @staticmethod
    def forward(layer: Layer[VBLoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        A, B = layer.once("factors", lambda: VBLoRA.factors(layer))
        return lowrank_update(y, layer.dropout(x), A, B)

    @staticmethod
    def factors(layer: Layer[VBLoRAConfig]) -> tuple[Tensor, Tensor]:
        A, B = mixtures(layer, "lora_logits_A").flatten(1), mixtures(layer, "lora_logits_B").mT.flatten(0, 1)
        return A.to(layer.lora_bank.dtype), B.to(layer.lora_bank.dtype)


def length_of(d_in: int, d_out: int, cfg: VBLoRAConfig) -> int:
    """b of a layer."""
    common = math.gcd(d_in, d_out)
    return cfg.length or max(b for b in range(1, LONGEST + 1) if common % b == 0)


def mixtures(layer: Layer[VBLoRAConfig], name: str) -> Tensor:
    """(..., b) for logits (..., h)."""
    logits, places = layer.tiny(name).topk(layer.cfg.topk, dim=-1)
    return (logits.softmax(-1)[..., None] * layer.tiny("lora_bank")[places]).sum(-2)
