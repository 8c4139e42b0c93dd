"""RandLoRA: an update of full rank, a sum of frozen random pairs with trained diagonals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..core import AdapterConfig, Layer, ParamSpec, Variant, register
from ..ops.bases import scaled_bases
from ..ops.lowrank import lowrank_update
from ._shared import uniform


@dataclass(frozen=True, kw_only=True)
class RandLoRAConfig(AdapterConfig):
    variant: str = "randlora"
    r: int = 32
    alpha: float | None = None
    """Scale numerator; None means 20 r, the authors' choice."""
    pairing: Literal["paper", "peft"] = "paper"
    """Which column of B meets which row of A: those of the same pair, or, as in PEFT, whose files need it, those of the
    same place in two lists of different order."""

    @property
    def effective_alpha(self) -> float:
        return float(20 * self.r if self.alpha is None else self.alpha)


@register
class RandLoRA(Variant):
    """Full-rank update from frozen random bases: only diagonals are trained.

    ΔW = s Σ_n B_n diag(λ_n) A diag(γ_n) over n = ⌈m/r⌉ pairs, m = min(d_in, d_out), transposed where d_in > d_out; s =
    alpha/r = 20. A (r, m) and B (max, n, r), entries of variance 1, are frozen, shared by all layers, cut to each and
    saved once. λ (r, n) = 0 and γ (n, m) = 1/max(n, m) are trained, an exact zero at the start; n(r + m) parameters,
    and m(d_in + d_out) multiply-adds: the update is never multiplied out. Albert et al. 2025, RandLoRA: Full-Rank
    Parameter-Efficient Fine-Tuning of Large Models, arXiv 2502.00987.
    """

    name = "randlora"
    config = RandLoRAConfig
    paper = "2502.00987"
    family = "shared or random bases"
    lr = 1e-4

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: RandLoRAConfig) -> dict[str, ParamSpec]:
        m = min(d_in, d_out)
        n = -(-m // cfg.r)
        return {
            "lora_lambda": ParamSpec((cfg.r, n), decay=False),
            "lora_gamma": ParamSpec((n, m), init=f"constant:{1 / max(n, m)}", decay=False),
        }

    @staticmethod
    def shared_specs(targets: Any, cfg: RandLoRAConfig) -> dict[str, ParamSpec]:
        r, m = max(t.cfg.r for t in targets), max(min(t.d_in, t.d_out) for t in targets)
        most = max(max(t.d_in, t.d_out) for t in targets)
        n = max(t.specs["lora_lambda"].shape[1] for t in targets)
        return {
            "lora_A": ParamSpec((r, m), init=uniform(3**0.5), as_buffer=True),
            "lora_B": ParamSpec((most, n, r), init=uniform(3**0.5), as_buffer=True),
        }

    @staticmethod
    def forward(layer: Layer[RandLoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        A, B = layer.once("pairs", lambda: pairs(layer))
        return lowrank_update(y, layer.dropout(x), A, B, layer.cfg.scale)

    @staticmethod
    def factors(layer: Layer[RandLoRAConfig]) -> tuple[Tensor, Tensor]:
        A, B = pairs(layer)
        return A, layer.cfg.scale * B


def pairs(layer: Layer[RandLoRAConfig]) -> tuple[Tensor, Tensor]:
    """All pairs side by side: A (n r, d_in), B (d_out, n r)."""
    scales, gamma = layer.lora_lambda, layer.lora_gamma
    (r, n), m = scales.shape, gamma.shape[1]
    most = max(layer.in_features, layer.out_features)
    scaled = scaled_bases(layer.lora_A[:r, :m], scales, gamma)  # (r, n, m)
    A = (scaled if layer.cfg.pairing == "peft" else scaled.transpose(0, 1)).flatten(0, 1)
    B = layer.lora_B[:most, :n, :r].flatten(1)
    return (A, B) if layer.in_features <= layer.out_features else (B.mT, A.mT)
