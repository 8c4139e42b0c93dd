"""IA3: one trained gain per output, or per input of the layers named so."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..core import AdapterConfig, Layer, ParamSpec, Variant, matches, register
from ..ops.lowrank import scale_outputs


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    variant: str = "ia3"
    side: Literal["output", "input"] = "output"
    """Gate the outputs, bias included, or the inputs of a target."""
    input_names: tuple[str, ...] = ()
    """Regular expressions of the targets that are gated on their inputs; in the paper the last layer of the
    feed-forward: ("down_proj", "fc2", "wo")."""

    def patterns(self) -> list[tuple[str, str]]:
        return super().patterns() + [("input_names", p) for p in self.input_names]

    def for_target(self, path: str, role: str | None = None) -> AdapterConfig:
        cfg: Any = super().for_target(path, role)
        return dataclasses.replace(cfg, side="input") if any(matches(p, path) for p in self.input_names) else cfg


@register
class IA3(Variant):
    """A gain per feature: y' = y + δ ∘ y, or x' = x + δ ∘ x on the input side, the published gain being 1 + δ.

    δ (d_out) or (d_in) = 0: an exact zero is added at the start, and weight decay would pull to the base, not to
    nothing. An output gain scales the bias too. d_out parameters. The paper gates keys, values and the inputs of the
    last feed-forward layer; all layers learn more. PEFT trains 1 + δ itself and finds `feedforward_modules` by the end
    of the name. Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
    Learning, arXiv 2205.05638.
    """

    name = "ia3"
    config = IA3Config
    paper = "2205.05638"
    family = "gains and biases"
    ignores = ("r", "alpha", "dropout")
    lr = 5e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: IA3Config) -> dict[str, ParamSpec]:
        return {"lora_g": ParamSpec((d_out if cfg.side == "output" else d_in,), decay=False)}

    @staticmethod
    def by_feature(layer: Layer[IA3Config], side: str) -> tuple[Tensor, ...] | None:
        return (layer.lora_g,) if layer.cfg.side == side else None

    @staticmethod
    def act(cfg: IA3Config, v: Tensor, g: Tensor) -> Tensor:
        return scale_outputs(v, g, None)

    @staticmethod
    def forward_input(layer: Layer[IA3Config], x: Tensor) -> Tensor:
        return scale_outputs(x, layer.lora_g, None) if layer.cfg.side == "input" else x

    @staticmethod
    def forward(layer: Layer[IA3Config], x: Tensor, y: Tensor) -> Tensor:
        return scale_outputs(y, layer.lora_g, None) if layer.cfg.side == "output" else y
