"""Arrow: other adapters as experts, chosen token by token by what they attend to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.linalg import precise, thin_qr, thin_svd
from ..ops.lowrank import add_lowrank

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class ArrowConfig(AdapterConfig):
    variant: str = "arrow"
    experts: int = 1
    """Number of adapters; counted at attach."""
    top: int = 3
    """So many experts act on a token."""
    temperature: float = 1.0
    """The scores are divided by it."""

    def validate(self) -> None:
        super().validate()
        if min(self.experts, self.top) < 1 or not 1e-3 <= self.temperature <= 1e3:
            raise ConfigError(
                f"ArrowConfig: experts, top={self.top} begin at 1, temperature={self.temperature} at 1e-3."
            )


@register
class Arrow(Variant):
    """A router without training: each expert is a trained low-rank adapter, its key the input that it amplifies most.

    y' = y + Σ_e p_e B_e A_e drop(x), p = softmax(|v_e·x| / T) over the `top` largest scores, v_e the first right
    singular vector of B_e A_e, exact by QR of A_e (PEFT iterates 15 times). The experts are given at attach and copied,
    nothing is trained: `ll.attach(model, ll.ArrowConfig(), [ll.factors(model, name) for name in names])`; r becomes
    their largest rank. PEFT's GenKnowSub, which first subtracts the mean of general adapters from A and from B, is not
    here. E(r(d_in + d_out) + d_in) frozen numbers and multiply-adds. Ostapenko et al. 2024, Towards Modular LLMs by
    Building and Reusing a Library of LoRAs, arXiv 2405.11157."""

    name = "arrow"
    config = ArrowConfig
    paper = "2405.11157"
    family = "mixtures and tasks"
    needs_data = "adapters"
    affine = False
    identity_bound = torch.inf
    ignores = ("alpha",)

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: ArrowConfig) -> dict[str, ParamSpec]:
        shapes = {"A": (cfg.experts, cfg.r, d_in), "B": (cfg.experts, d_out, cfg.r), "v": (cfg.experts, d_in)}
        return {f"lora_{k}": ParamSpec(shape, init="empty", as_buffer=True) for k, shape in shapes.items()}

    @staticmethod
    def group_init(model: Any, targets: Any, cfg: ArrowConfig, data: Any) -> None:
        experts = list(data)
        if not experts or not all(isinstance(one, Mapping) for one in experts):
            raise ConfigError(
                "arrow is made of other adapters: ll.attach(model, ll.ArrowConfig(), [ll.factors(model, name) for name "
                "in names])."
            )
        for layer in list(targets):
            pairs: list[Pair | None] = [one.get(layer.path) for one in experts]
            if not any(pairs):
                targets.remove(layer)
                continue
            r = max(len(pair[0]) for pair in pairs if pair is not None)
            layer.resize(r=r, experts=len(pairs))
            found = [_expert(layer, pair) for pair in pairs]
            layer.lora_A, layer.lora_B, layer.lora_v = (torch.stack(side) for side in zip(*found, strict=True))

    @staticmethod
    def forward(layer: Layer[ArrowConfig], x: Tensor, y: Tensor) -> Tensor:
        E, top = layer.cfg.experts, min(layer.cfg.top, layer.cfg.experts)
        scores = (precise(x) @ precise(layer.lora_v).mT).abs() / layer.cfg.temperature
        least = scores.topk(top, -1).values[..., -1:]
        p = scores.masked_fill(scores < least, -torch.inf).softmax(-1).to(x.dtype)
        z = layer.dropout(x) @ layer.lora_A.flatten(0, 1).mT
        mixed = (p[..., None] * z.unflatten(-1, (E, -1))).flatten(-2)
        return add_lowrank(y, mixed, layer.lora_B.transpose(0, 1).flatten(1))


def _expert(layer: Any, pair: Pair | None) -> tuple[Tensor, Tensor, Tensor]:
    """A and B padded to the layer's rank, and the first right singular vector of B A; zeros for an expert that does not
    stand here."""
    r = layer.cfg.r
    A0, B0 = torch.zeros(r, layer.in_features), torch.zeros(layer.out_features, r)
    if pair is None:
        return A0, B0, A0[0]
    A, B = (precise(t.detach()).cpu() for t in pair)
    if A.shape[1] != layer.in_features or B.shape != (layer.out_features, len(A)):
        raise ConfigError(
            f"{layer.path}: an expert brings A {tuple(A.shape)} and B {tuple(B.shape)}, not of this layer."
        )
    Q, R = thin_qr(A.mT) if len(A) <= A.shape[1] else (torch.eye(A.shape[1], dtype=A.dtype), A.mT)
    _, _, V = thin_svd(B @ R.mT)
    k = r - len(A)
    return F.pad(A, (0, 0, 0, k)), F.pad(B, (0, k)), Q @ V[0]
