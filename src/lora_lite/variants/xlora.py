"""X-LoRA: other adapters, weighed token by token by what the model makes of the whole text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, register
from ._experts import ExpertsConfig, OfAdapters, expert_specs, mixed, narrowed


@dataclass(frozen=True, kw_only=True)
class XLoRAConfig(ExpertsConfig):
    variant: str = "xlora"
    width: int = 0
    """Width of the hidden states that `ll.context(model, hidden=...)` gives; 0: none, each layer learns one mixture."""
    top: int = 0
    """Only the so many largest gates act, not scaled up; 0: all."""

    def validate(self) -> None:
        super().validate()
        if min(self.width, self.top) < 0:
            raise ConfigError(f"XLoRAConfig: width={self.width} and top={self.top} begin at 0.")


@register
class XLoRA(OfAdapters):
    """X-LoRA: trained low-rank adapters, mixed by gates of each layer that read the model's last hidden state.

    y' = y + Σ_e p_e B_e A_e drop(x), p = softmax((G h + g) / T) per token, G (E, width) = 0 and g (E) = 0 trained: it
    starts as the mean of the adapters, which are given as `[ll.factors(model, name) for name in names]` and copied. h
    is the last hidden state of a pass of the bare model, which the caller makes and says: `with ll.active(model, None):
    h = model(**batch, output_hidden_states=True).hidden_states[-1]`, then `with ll.context(model, hidden=h):`; (B, T,
    width), or (B, width) for one mixture per row, which is what generation with a cache can use. The paper's gates per
    layer; PEFT's other forms (one head for all layers, which is its default, and deeper ones) are not here, and PEFT
    makes both passes itself, without a cache. E(width + 1) parameters per layer, E r(d_in + d_out) multiply-adds. No
    rate is published: this one is a guess. Buehler and Buehler 2024, arXiv 2402.07148."""

    name = "xlora"
    config = XLoRAConfig
    paper = "2402.07148"
    family = "mixtures and tasks"
    lr = 1e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: XLoRAConfig) -> dict[str, ParamSpec]:
        gates = {"lora_g": ParamSpec((cfg.experts,), decay=False)}
        if cfg.width:
            gates["lora_G"] = ParamSpec((cfg.experts, cfg.width))
        return {**expert_specs(d_in, d_out, cfg), **gates}

    @staticmethod
    def forward(layer: Layer[XLoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        cfg, scores = layer.cfg, layer.lora_g
        if cfg.width:
            h = layer.context("hidden").to(x.dtype)
            if h.shape not in ((len(x), cfg.width), (*x.shape[:-1], cfg.width)):
                raise ConfigError(
                    f"{layer.path}: hidden is {tuple(h.shape)} for inputs {tuple(x.shape)}; it is (rows, {cfg.width}), "
                    f"or (rows, tokens, {cfg.width}) with the tokens of this call."
                )
            scores = h @ layer.lora_G.mT + scores
            scores = scores[:, None] if h.dim() < x.dim() else scores
        p = (scores / cfg.temperature).softmax(-1)
        if cfg.top:
            p = p * (p >= p.topk(min(cfg.top, cfg.experts), -1).values[..., -1:])
        return mixed(layer, y, narrowed(layer, x), p)
