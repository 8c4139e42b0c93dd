"""OSF: the small singular triplets are trained, in directions that leave the large ones alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..core.config import MAX_RANK
from ..ops.linalg import thin_svd
from ..ops.lowrank import lowrank_update


@dataclass(frozen=True, kw_only=True)
class OSFConfig(AdapterConfig):
    variant: str = "osf"
    r: int = MAX_RANK
    """Smallest triplets that are trained; half of them where a weight has no more, as by default and in PEFT."""


@register
class OSF(Variant):
    """Orthogonal subspace fine-tuning: the r smallest singular triplets learn, orthogonally to the others.

    W = U_h S_h V_hᵀ + U_l S_l V_lᵀ; W' = W + U S V − U_l S_l V_l with U = U_l + P ΔU, S = S_l + ΔS, V = V_l + ΔV Q,
    where P = I − U_h U_hᵀ and Q = I − V_h V_hᵀ take out the directions of the large triplets, Δ = 0 at the start. So
    the change itself stays in their complement under any optimiser: PEFT and the authors filter the gradients, after
    which the step of Adam leaves it. Where a side is the shorter one, or the weight a square, P ΔU = U_l U_lᵀ ΔU, so
    that one factor of the change is frozen. alpha is not used. r(d_in + d_out + 1) parameters, r(d_in + d_out)
    multiply-adds per token, and as many frozen numbers. Nayak et al. 2025, Sculpting Subspaces: Constrained Full
    Fine-Tuning in LLMs for Continual Learning, arXiv 2504.07097.
    """

    name = "osf"
    config = OSFConfig
    paper = "2504.07097"
    family = "low rank from the weight or from data"
    needs_weight = True
    ignores = ("alpha",)
    lr = 5e-4
    width_growth = -0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: OSFConfig) -> dict[str, ParamSpec]:
        n = min(d_in, d_out)
        r = cfg.r if cfg.r < n else max(1, n // 2)
        if r >= n:
            raise ConfigError(f"a {d_in}->{d_out} weight has one triplet, and one must stay; add it to exclude_names.")
        shapes = {"U": (d_out, r), "S": (r,), "V": (r, d_in)}
        specs = {f"lora_{k}": ParamSpec(shape, decay=False) for k, shape in shapes.items()}
        specs |= {f"lora_{k}0": ParamSpec(shape, init="empty", as_buffer=True) for k, shape in shapes.items()}
        if d_in != d_out:  # what the longer side's small vectors and the large ones do not span together
            specs["lora_H"] = ParamSpec((n - r, max(d_in, d_out)), init="empty", as_buffer=True)
        return specs

    @staticmethod
    def init(layer: Layer[OSFConfig], cfg: OSFConfig) -> None:
        W = layer.weight
        U, S, V = thin_svd(W.to(torch.promote_types(torch.float32, W.dtype)))
        n = len(S) - len(layer.lora_S0)
        layer.lora_U0, layer.lora_S0, layer.lora_V0 = U[:, n:], S[n:], V[n:]
        if layer.in_features != layer.out_features:
            layer.lora_H = V[:n] if layer.in_features > layer.out_features else U[:, :n].mT

    @staticmethod
    def factors(layer: Layer[OSFConfig]) -> tuple[Tensor, Tensor]:
        """A (r, d_in) and B (d_out, r) of the change: the factor of the shorter side is frozen."""
        U0, s0, V0, d_in, d_out = layer.lora_U0, layer.lora_S0, layer.lora_V0, layer.in_features, layer.out_features
        U, s, V = layer.lora_U, layer.lora_S, layer.lora_V
        if d_in > d_out:
            return _longer(V0.mT, V.mT, s0, s, layer.lora_H, U.mT @ U0).mT, U0
        if d_out > d_in:
            return V0, _longer(U0, U, s0, s, layer.lora_H, V @ V0.mT)
        N, M = U0.mT @ U, V @ V0.mT  # P = U0 U0ᵀ and Q = V0ᵀ V0
        turned = N * (s0 + s)
        return V0, U0 @ (turned + (turned + torch.diag(s0 + s)) @ M + torch.diag(s))

    @staticmethod
    def forward(layer: Layer[OSFConfig], x: Tensor, y: Tensor) -> Tensor:
        return lowrank_update(y, layer.dropout(x), *layer.once("factors", lambda: OSF.factors(layer)))


def _longer(U0: Tensor, U: Tensor, s0: Tensor, s: Tensor, H: Tensor, M: Tensor) -> Tensor:
    """(U0 + P U) S (I + M) − U0 S0 with P = I − HᵀH and S = S0 + ΔS, without cancellation."""
    PU = U - H.mT @ (H @ U)
    return PU * (s0 + s) + U0 * s + ((U0 + PU) * (s0 + s)) @ M
