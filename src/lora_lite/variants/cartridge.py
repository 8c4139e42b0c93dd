"""Cartridge: the keys and values of a text, trained on, the first of them frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, Variant, register
from ._prompt import PrefixConfig


@dataclass(frozen=True, kw_only=True)
class CartridgeConfig(PrefixConfig):
    variant: str = "cartridge"
    frozen: int = 1
    """How many tokens at the front stay as they are: the first draws attention whatever it says."""

    def validate(self) -> None:
        super().validate()
        if not 0 <= self.frozen < self.r:
            raise ConfigError(f"CartridgeConfig.frozen must lie between 0 and r - 1 = {self.r - 1}, got {self.frozen}.")


@register
class Cartridge(Variant):
    """A key-value cache as parameters: it starts as that of the first r tokens of a corpus and is trained to answer for
    the whole.

    y = softmax(q [K_P; K]ᵀ / √h) [V_P; V] in every attention, K_P = K0 + D_K and V_P = V0 + D_V (r, d_kv): K0, V0 what
    the model itself keeps of the first r tokens of `calibration_data`, positions included, D = 0 trained but for the
    first `frozen` tokens. The paper trains it by distillation from the model with the corpus in its context; the loss
    is the caller's. PEFT fills the start in a step of its own. 2(r − frozen)d_kv parameters per layer. Eyuboglu et al.
    2025, Cartridges: Lightweight and General-Purpose Long Context Representations via Self-Study, arXiv 2506.06266."""

    name = "cartridge"
    config = CartridgeConfig
    paper = "2506.06266"
    family = "before the text"
    site = "attention"
    needs_data = "batches"
    affine = False
    identity_bound = torch.inf
    ignores = ("alpha", "dropout")
    lr = 1e-2

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: CartridgeConfig) -> dict[str, ParamSpec]:
        start = ParamSpec((cfg.r, d_out), init="empty", as_buffer=True)
        change = ParamSpec((cfg.r - cfg.frozen, d_out), decay=False)
        return {"lora_K0": start, "lora_V0": start, "lora_K": change, "lora_V": change}

    @staticmethod
    def group_init(model: Any, targets: Any, cfg: CartridgeConfig, data: Any) -> None:
        for layer, K, V in targets.remembered(data, cfg.r):
            layer.lora_K0, layer.lora_V0 = K, V

    @staticmethod
    def prefix(layer: Layer[CartridgeConfig]) -> tuple[Tensor, Tensor]:
        n = layer.cfg.frozen
        K, V = ((0 * t0[:n], t) for t0, t in ((layer.lora_K0, layer.lora_K), (layer.lora_V0, layer.lora_V)))
        return layer.lora_K0 + torch.cat(K), layer.lora_V0 + torch.cat(V)
