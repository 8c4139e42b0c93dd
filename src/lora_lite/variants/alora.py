"""aLoRA: LoRA that acts from an invocation on, so that what came before may stay in the base's cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import Layer, ParamSpec, Variant, register
from ..core.positions import parse_positions
from ._lowrank import ScaledConfig


@dataclass(frozen=True, kw_only=True)
class ALoRAConfig(ScaledConfig):
    variant: str = "alora"
    r: int = 32
    positions: str = "all"
    """Tokens on which the adapter acts: "from:5,17" are those from the last occurrence of the token ids 5, 17 on, this
    one included; a row without them is the base. "all" is LoRA; also what other methods take: "generated", "l1", ..."""

    def validate(self) -> None:
        super().validate()
        parse_positions(self.positions, "ALoRAConfig.positions")


@register
class ALoRA(Variant):
    """Activated LoRA: the update acts on the tokens from the last invocation on, and on no token before.

    y' = y + s (drop(x) Aᵀ) Bᵀ at those positions and y' = y at all others, A (r, d_in) ~ U(±1/√d_in), B (d_out, r) = 0,
    an exact zero at the start; s = alpha/r, or alpha/√r with `use_rslora`. Keys and values of the tokens before are the
    base's, so that a cache filled without the adapter can be continued. Not the same function at every token: only
    "all" can be merged. r(d_in + d_out) parameters. Greenewald et al. 2025, Activated LoRA: Fine-tuned LLMs for
    Intrinsics, arXiv 2504.12397.
    """

    name = "alora"
    config = ALoRAConfig
    paper = "2504.12397"
    family = "low rank"
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: ALoRAConfig) -> dict[str, ParamSpec]:
        return {"lora_A": ParamSpec((cfg.r, d_in), init="kaiming"), "lora_B": ParamSpec((d_out, cfg.r))}

    @staticmethod
    def forward(layer: Layer[ALoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        for span in layer.spans(y):
            z = layer.dropout(span.take(x)) @ layer.lora_A.mT
            y = span.add(y, layer.cfg.scale * (z @ layer.lora_B.mT))
        return y
