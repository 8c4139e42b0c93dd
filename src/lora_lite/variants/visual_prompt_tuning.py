"""Visual prompt tuning: trained tokens that every block of a vision transformer attends to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import Layer, ParamSpec, Variant, register
from ._prompt import PrefixConfig


@dataclass(frozen=True, kw_only=True)
class VisualPromptTuningConfig(PrefixConfig):
    variant: str = "visual_prompt_tuning"
    r: int = 10


@register
class VisualPromptTuning(Variant):
    """VPT-deep: in every block r tokens of its own stand among those of the image, and are replaced in the next.

    y = softmax(q [W_k P; K]ᵀ / √h) [W_v P; V] with the layer's own W_k, W_v, P (r, d) ~ N(0, 1) trained per layer: a
    block's prompts act by their keys and values alone, since what becomes of them is thrown away, so that the sequence
    keeps its length and the same is an adapter of any attention. P is what the attention reads, after the block's norm;
    the paper's stands before it, drawn by Xavier's rule, which the norm brings to the same size. VPT-shallow, whose
    prompts go through all blocks, is not here. r·d parameters per layer. The paper searches rates of SGD; this one is a
    guess. Jia et al. 2022, Visual Prompt Tuning, arXiv 2203.12119."""

    name = "visual_prompt_tuning"
    config = VisualPromptTuningConfig
    paper = "2203.12119"
    family = "before the text"
    also = {"VPT": "", "visual prompts": ""}
    site = "attention"
    affine = False
    ignores = ("alpha", "dropout")
    identity_bound = float("inf")
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: VisualPromptTuningConfig) -> dict[str, ParamSpec]:
        return {"lora_P": ParamSpec((cfg.r, d_in), init="normal", decay=False)}

    @staticmethod
    def prefix(layer: Layer[VisualPromptTuningConfig]) -> tuple[Tensor, Tensor]:
        return layer.keys_and_values(layer.lora_P)
