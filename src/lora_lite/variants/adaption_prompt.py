"""LLaMA-Adapter: an attention of its own to trained hidden states, behind a gate that starts closed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import Layer, ParamSpec, Variant, register
from ._prompt import PrefixConfig


@dataclass(frozen=True, kw_only=True)
class AdaptionPromptConfig(PrefixConfig):
    variant: str = "adaption_prompt"
    r: int = 10


@register
class AdaptionPrompt(Variant):
    """LLaMA-Adapter: a second attention of the same queries to r trained hidden states, times a gate that starts at
    0.

    y' = y + g softmax(q (W_k P)ᵀ / √h) (W_v P), P (r, d) ~ N(0, 1) and g (1) = 0 trained per layer, before the output
    projection, which PEFT applies to both parts apart (a bias of it counts twice there). The paper adapts the topmost
    blocks (30 of 32): `layers=`. Nothing of it enters the key-value cache. r·d + 1 parameters per layer. Zhang et al.
    2023, LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention, arXiv 2303.16199.
    """

    name = "adaption_prompt"
    config = AdaptionPromptConfig
    paper = "2303.16199"
    family = "before the text"
    also = {"LLaMA-Adapter": ""}
    site = "attention"
    affine = False
    ignores = ("alpha", "dropout")
    lr = 9e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: AdaptionPromptConfig) -> dict[str, ParamSpec]:
        return {
            "lora_P": ParamSpec((cfg.r, d_in), init="normal", decay=False),
            "lora_g": ParamSpec((1,), decay=False),
        }

    @staticmethod
    def forward(layer: Layer[AdaptionPromptConfig], x: Tensor, y: Tensor) -> Tensor:
        return y + layer.lora_g * layer.attend(x, *layer.keys_and_values(layer.lora_P))
