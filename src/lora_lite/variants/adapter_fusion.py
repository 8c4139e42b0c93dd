"""AdapterFusion: an attention of each token over what several trained adapters answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import Layer, ParamSpec, register
from ._bottleneck import ACTIVATIONS, Activation
from ._experts import ExpertsConfig, OfAdapters, Pair, copied, expert_specs, narrowed, wide


@dataclass(frozen=True, kw_only=True)
class AdapterFusionConfig(ExpertsConfig):
    variant: str = "adapter_fusion"
    bottlenecks: bool = False
    """The adapters are bottlenecks on y; otherwise low-rank updates of x. Seen at attach."""
    activation: Activation = "silu"
    """That of the bottlenecks."""
    value_decay: float = 0.01
    """Share of ‖V − 1‖² in `ll.penalty`."""


@register
class AdapterFusion(OfAdapters):
    """AdapterFusion: each token attends to the answers of several trained adapters, its own output being the query.

    y' = y + V Σ_e p_e h_e, p = softmax((Q y + q)·(K h_e) / T), h_e the change that adapter e would make; Q, K (d_out,
    d_out) ~ N(0, 0.02²), q = 0 and V = 1 + ΔV, ΔV = 0, trained, and 0.01 ‖ΔV‖² of each layer in `ll.penalty`. The
    adapters are given at attach and copied: bottlenecks as `[ll.adapter_state_dict(model, name) for name in names]`,
    with their `activation` and alpha = r, or low-rank ones as `[ll.factors(model, name) for name in names]`. The
    `adapters` library starts V with 1e-6 beside the ones, and reads the sum with the residual as query on post-norm
    models. K and V stand outside of the sum over e, so that no answer is built. 3 d_out² + d_out parameters. The rate
    is a guess. Pfeiffer et al. 2020, AdapterFusion: Non-Destructive Task Composition for Transfer Learning, arXiv
    2005.00247."""

    name = "adapter_fusion"
    config = AdapterFusionConfig
    paper = "2005.00247"
    family = "bottlenecks"
    affine = False
    lr = 1e-4
    width_growth = 1.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: AdapterFusionConfig) -> dict[str, ParamSpec]:
        specs = expert_specs(d_out if cfg.bottlenecks else d_in, d_out, cfg)
        if cfg.bottlenecks:
            for name, n in (("lora_c", cfg.r), ("lora_e", d_out)):
                specs[name] = ParamSpec((cfg.experts, n), init="empty", as_buffer=True)
        square = (d_out, d_out)
        return specs | {
            "lora_Q": ParamSpec(square, init="normal:0.02"),
            "lora_K": ParamSpec(square, init="normal:0.02"),
            "lora_q": ParamSpec((d_out,), decay=False),
            "lora_V": ParamSpec(square),
        }

    @staticmethod
    def group_init(model: Any, targets: Any, cfg: AdapterFusionConfig, data: Any) -> None:
        experts: list[Any] = list(data)
        if not all(hasattr(one, "keys") and any(str(k).endswith(".lora_D") for k in one) for one in experts):
            for _ in copied(targets, cfg, experts, bottlenecks=False):
                pass
            return
        found = [_bottleneck(one) for one in experts]
        for layer, pairs in copied(targets, cfg, [pairs for pairs, _ in found], bottlenecks=True):
            zeros = layer.lora_c[0], layer.lora_e[0]
            shifts = [own.get(layer.path, zeros) for _, own in found]
            layer.lora_c = torch.stack([F.pad(c, (0, len(pairs[0][0]) - len(c))) for c, _ in shifts])
            layer.lora_e = torch.stack([e for _, e in shifts])

    @staticmethod
    def forward(layer: Layer[AdapterFusionConfig], x: Tensor, y: Tensor) -> Tensor:
        cfg, E = layer.cfg, layer.cfg.experts
        query = (F.linear(y, layer.lora_Q, layer.lora_q) @ layer.lora_K) / cfg.temperature
        if cfg.bottlenecks:
            into = F.linear(y, layer.lora_A.flatten(0, 1), layer.lora_c.flatten())
            z: Tensor = ACTIVATIONS[cfg.activation](into).view(*y.shape[:-1], E, cfg.r)
        else:
            z = narrowed(layer, x)
        scores = ((query @ wide(layer)).view(z.shape) * z).sum(-1)
        if cfg.bottlenecks:
            scores = scores + query @ layer.lora_e.mT
        p = scores.softmax(-1)
        h = (p[..., None] * z).flatten(-2) @ wide(layer).mT
        if cfg.bottlenecks:
            h = h + p @ layer.lora_e
        return y + h + h @ layer.lora_V.mT

    @staticmethod
    def penalty(layer: Layer[AdapterFusionConfig]) -> Tensor:
        return layer.cfg.value_decay * layer.lora_V.square().sum()


def _bottleneck(state: Mapping[str, Tensor]) -> tuple[dict[str, Pair], dict[str, Pair]]:
    """Path -> (D, U) and path -> (c, e) of a bottleneck adapter, its gains multiplied in."""
    factors: dict[str, Pair] = {}
    shifts: dict[str, Pair] = {}
    for name, D in state.items():
        path, _, short = name.rpartition(".")
        if short == "lora_D":
            U, c, e = (state[f"{path}.lora_{k}"] for k in "Uce")
            gain = 1 + state.get(f"{path}.lora_g", torch.zeros_like(e))
            factors[path], shifts[path] = (D, gain[:, None] * U), (c, gain * e)
    return factors, shifts
