"""AntiPaSTO: a steering direction in the singular space of the weight, with a strength that is chosen at run time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..core import ConfigError, Layer, ParamSpec, Targets, register
from ..ops.linalg import block_diagonal, thin_svd
from ..ops.orthogonal import cayley_minus_identity, skew
from ..ops.spectrum import fix_signs
from ._svd import SVDConfig
from ._svd_core import SVDCore, basis_specs, triplets


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOConfig(SVDConfig):
    variant: str = "antipasto"
    r: int = 64
    """Singular triplets that take part."""
    max_angle: float = math.pi / 3
    """No plane turns further than this (radians, below π), whatever the parameters and the strength."""
    block: int | None = None
    """Size of the blocks that rotate; it must divide r. None: 4, 3 or 2, the first that divides r, or else r itself."""

    def validate(self) -> None:
        super().validate()
        if not 0 < self.max_angle < math.pi:
            raise ConfigError(f"AntiPaSTOConfig.max_angle must lie in (0, π), got {self.max_angle}.")
        if self.block is not None and self.block < 1:
            raise ConfigError(f"AntiPaSTOConfig.block must be positive, got {self.block}.")


def block_size(k: int, cfg: AntiPaSTOConfig) -> int:
    """Size of the rotating blocks among k triplets."""
    if cfg.block is not None and k % cfg.block:
        raise ConfigError(f"block={cfg.block} does not divide the {k} triplets; change r or block.")
    return cfg.block or [b for b in (4, 3, 2, k) if k % b == 0][0]


@register
class AntiPaSTO(SVDCore):
    """Anti-parallel steering: α = 1 and α = −1 push the layer in opposite directions, α = 0 is the bare base bit for
    bit.

    W'(α) = U (S + αΔS) R(α) Vᵀ + rest over r triplets, R(α) = Cayley(αQ c) block-diagonal; ΔS (r,) and the skew Q from
    zero, the scale alpha is not used. α is the adapter's weight: `ll.activate(model, {"default": -1.0})`. R(α) R(−α) =
    I. The angles: a plane of Cayley(Q) turns by 2 atan μ, μ ≤ ‖q‖ for the entries q above the diagonal of its block, so
    with t = tan(θ/2), θ = `max_angle`, c = (1 + ‖αq‖²/t²)^−½ bounds all of them by θ; the authors rotate all r triplets
    as one block (`block=r`) and bound single entries, so that their planes turn further. With `calibration_data` the
    triplets are those with the largest S_i (E(v_iᵀx)²)^½, otherwise those with the largest S_i. The authors start ΔS
    and Q at small random values, which departs from the base. Clark 2026, AntiPaSTO, arXiv 2601.07473.
    """

    name = "antipasto"
    config = AntiPaSTOConfig
    paper = "2601.07473"
    family = "low rank from the weight or from data"
    ignores = ("alpha",)
    own_weight = True
    lr = 2e-3
    width_growth = -0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: AntiPaSTOConfig) -> dict[str, ParamSpec]:
        k = triplets(d_in, d_out, cfg)
        b, specs = block_size(k, cfg), {"lora_dS": ParamSpec((k,), decay=False)}
        if b > 1:
            specs["lora_Q"] = ParamSpec((k // b, b * (b - 1) // 2), decay=False)
        return {**specs, **basis_specs(d_in, d_out, cfg)}

    @staticmethod
    def group_init(
        model: nn.Module, targets: Targets[AntiPaSTOConfig], cfg: AntiPaSTOConfig, calibration_data: Any
    ) -> None:
        if calibration_data is None:
            return
        for gram in targets.each_gram(calibration_data):
            for view in gram.views:
                W = view.weight.to(gram.C.dtype)
                U, S, Vh = thin_svd(W)
                power = ((Vh @ (gram.C / gram.n)) * Vh).sum(-1).clamp_min(0)
                best = (S * power.sqrt()).argsort(descending=True, stable=True)[: view.lora_S.shape[0]].sort().values
                V = Vh[best].mT
                view.lora_U, view.lora_S, view.lora_V = U[:, best] * fix_signs(V), S[best], (V * fix_signs(V)).mT

    @staticmethod
    def change(layer: Layer[AntiPaSTOConfig]) -> Tensor:
        alpha, dS = layer.strength, layer.strength * layer.tiny("lora_dS")
        b = block_size(dS.shape[0], layer.cfg)
        if b == 1:
            return dS
        q, t = alpha * layer.tiny("lora_Q"), math.tan(layer.cfg.max_angle / 2)
        q = q * (1 + (q / t).square().sum(-1, keepdim=True)).rsqrt()
        E = block_diagonal(cayley_minus_identity(skew(q, b)))
        return (layer.tiny("lora_S") + dS)[:, None] * E + dS.diag()
