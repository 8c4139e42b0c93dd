"""Arrow: other adapters as experts, chosen token by token by what they attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, register
from ..ops.linalg import precise, thin_qr, thin_svd
from ._experts import ExpertsConfig, OfAdapters, Pair, copied, expert_specs, mixed, narrowed


@dataclass(frozen=True, kw_only=True)
class ArrowConfig(ExpertsConfig):
    variant: str = "arrow"
    top: int = 3
    """So many experts act on a token."""
    general: int = 0
    """The last so many adapters are general knowledge, and their mean is taken from each of the others (GenKnowSub)."""

    def validate(self) -> None:
        super().validate()
        if self.top < 1 or self.general < 0:
            raise ConfigError(f"ArrowConfig: top={self.top} begins at 1, general={self.general} at 0.")


@register
class Arrow(OfAdapters):
    """A router without training: each expert is a trained low-rank adapter, its key the input that it amplifies most.

    y' = y + Σ_e p_e B_e A_e drop(x), p = softmax(|v_e·x| / T) over the `top` largest scores, v_e the first right
    singular vector of B_e A_e, exact by QR of A_e (PEFT iterates 15 times). The experts are given at attach and copied,
    nothing is trained: `ll.attach(model, ll.ArrowConfig(), [ll.factors(model, name) for name in names])`; r becomes
    their largest rank. `general`: GenKnowSub (arXiv 2505.10939), each B_e A_e less the mean of the general ones; PEFT
    takes the means from A and from B apart, which leaves products of both. E(r(d_in + d_out) + d_in) frozen numbers and
    multiply-adds. Ostapenko et al. 2024, Towards Modular LLMs by Building and Reusing a Library of LoRAs, arXiv
    2405.11157."""

    name = "arrow"
    config = ArrowConfig
    paper = "2405.11157"
    family = "mixtures and tasks"
    affine = False
    also = {"GenKnowSub": "general=1 or more"}

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: ArrowConfig) -> dict[str, ParamSpec]:
        keys = ParamSpec((max(1, cfg.experts - cfg.general), d_in), init="empty", as_buffer=True)
        return {**expert_specs(d_in, d_out, cfg), "lora_v": keys}

    @staticmethod
    def group_init(model: Any, targets: Any, cfg: ArrowConfig, data: Any) -> None:
        for layer, pairs in copied(targets, cfg, data):
            n = len(pairs) - cfg.general
            if n < 1:
                raise ConfigError(f"arrow: general={cfg.general} leaves none of {len(pairs)} adapters to choose from.")
            layer.lora_v = torch.stack([_key(pair, pairs[n:]) for pair in pairs[:n]])

    @staticmethod
    def forward(layer: Layer[ArrowConfig], x: Tensor, y: Tensor) -> Tensor:
        n, general = len(layer.lora_v), layer.cfg.general
        scores = (precise(x) @ precise(layer.lora_v).mT).abs() / layer.cfg.temperature
        least = scores.topk(min(layer.cfg.top, n), -1).values[..., -1:]
        p = scores.masked_fill(scores < least, -torch.inf).softmax(-1).to(x.dtype)
        if general:  # Σ p = 1, so that their mean comes off once
            p = torch.cat((p, p.new_full((*p.shape[:-1], general), -1 / general)), -1)
        return mixed(layer, y, narrowed(layer, x), p)


def _key(pair: Pair, general: list[Pair]) -> Tensor:
    """First right singular vector of B A less the mean of the general products."""
    A = torch.cat([pair[0], *(A for A, _ in general)])
    B = torch.cat([pair[1], *(-B / len(general) for _, B in general)], 1)
    Q, R = thin_qr(A.mT) if len(A) <= A.shape[1] else (torch.eye(A.shape[1], dtype=A.dtype), A.mT)
    return Q @ thin_svd(B @ R.mT)[2][0]
