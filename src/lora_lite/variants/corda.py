"""CorDA and its relatives: PiSSA in coordinates that the layer's inputs choose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..core import AdapterConfig, ConfigError, Gram, StagedLayer, Targets, register
from ..ops.krylov import Product, dense
from ..ops.linalg import cholesky, norm, precise, thin_svd
from ..ops.spectrum import fix_signs, top_left
from ._deviation import Deviation


@dataclass(frozen=True, kw_only=True)
class CorDAConfig(AdapterConfig):
    variant: str = "corda"
    whiten: Literal["none", "asvd", "cov", "cov_half"] = "cov"
    """P: the identity (PiSSA), diag((mean|x|)^a) (ASVD), C = E[xxᵀ] (CorDA), or C^½, which keeps the most of the
    layer's output."""
    mode: Literal["ipm", "kpm"] = "ipm"
    """Train the largest components of WP ("ipm", to learn the calibrated task) or the smallest ("kpm", to keep what the
    data shows)."""
    exponent: float = 0.5
    """a of ASVD."""
    damping: float = 0.01
    """Added to C's eigenvalues, over their mean, so that every direction has some weight."""

    def validate(self) -> None:
        super().validate()
        if not self.damping > 0:
            raise ConfigError(f"CorDAConfig.damping must be positive, got {self.damping}.")


@register
class CorDA(Deviation):
    """Low-rank update that starts from components of the weight, ordered by what the calibration data makes of them.

    With W P = U S Vᵀ and k the largest or smallest r components: s B0A0 = U_k S_k V_kᵀ P⁻¹, B0 (d_out, r), A0 (r,
    d_in), each taking √S_k, then scaled to equal norms. y' = y + s (BA − B0A0) x. C = Σ xxᵀ over tokens that are no
    padding, damped by δ·mean(λ). ‖(W − s B0A0) C^½‖ is least for P = C^½ (any factor PPᵀ = C gives the same B0A0, so
    Cholesky's is taken); P = C, as published, overweights the leading directions. 2r(d_in + d_out). The authors and
    PEFT divide x by its largest entry per batch, which weighs the batches of C differently (B0A0 moves by 7 to 9 % with
    four of random numbers), and rewrite W. Yang et al.
    2024, CorDA: Context-Oriented Decomposition Adaptation of Large Language Models, arXiv 2406.05223; Yuan et al. 2023,
    ASVD: Activation-aware Singular Value Decomposition, arXiv 2312.05821.
    """

    name = "corda"
    config = CorDAConfig
    paper = "2406.05223"
    family = "low rank from the weight or from data"
    needs_weight = True
    needs_data = "batches"
    lr = 1e-4
    width_growth = 0.5

    @staticmethod
    def group_init(model: nn.Module, targets: Targets[CorDAConfig], cfg: CorDAConfig, calibration_data: Any) -> None:
        if cfg.whiten == "none":
            for view in targets:
                start(view, same, same)
        elif cfg.whiten == "asvd":
            moments = targets.moments(calibration_data)
            for view in targets:
                d = (moments[view.path].abs / moments[view.path].n) ** cfg.exponent
                scaled = diagonal(d.clamp_min(1e-6 * d.max()))
                start(view, scaled, scaled)
        else:
            for gram in targets.each_gram(calibration_data):
                pair = half(gram, cfg.damping) if cfg.whiten == "cov_half" else whole(gram, cfg.damping)
                for view in gram.views:
                    start(view, *pair)


def same(v: Tensor) -> Tensor:
    """v."""
    return v


def diagonal(d: Tensor) -> Product:
    """diag(d) v."""

    def times(v: Tensor) -> Tensor:
        return d[:, None].to(v) * v

    return times


def whole(gram: Gram[CorDAConfig], damping: float) -> tuple[Product, Product]:
    """C v and Cᵀ v of the damped C, without C where the tokens are few."""
    shift = damping * (gram.trace / gram.n / len(gram.sum)).clamp_min(1e-30)

    def times(v: Tensor) -> Tensor:
        return gram.times(v) / gram.n + shift * v

    return times, times


def half(gram: Gram[CorDAConfig], damping: float) -> tuple[Product, Product]:
    """L v and Lᵀ v for L Lᵀ = C."""
    C = gram.C / gram.n
    C.diagonal().add_(damping * C.diagonal().mean().clamp_min(1e-30))
    L = cholesky(C)

    def times(v: Tensor) -> Tensor:
        return L.to(v) @ v

    def transposed(v: Tensor) -> Tensor:
        return L.mT.to(v) @ v

    return times, transposed


def start(view: StagedLayer[CorDAConfig], times: Product, transposed: Product) -> None:
    """A0, B0 of one target from P v and Pᵀ v: U_k S_k V_kᵀ P⁻¹ = U_k U_kᵀ W, so nothing is ever inverted."""
    cfg, W = view.cfg, precise(view.weight)

    def product(v: Tensor) -> Tensor:
        return W @ times(v)

    def back(u: Tensor) -> Tensor:
        return transposed(W.mT @ u)

    d_out, d_in = W.shape
    U, S = (
        top_left(product, back, d_out, d_in, cfg.r, W)
        if cfg.mode == "ipm"
        else smallest(dense(product, back, d_out, d_in, W), cfg.r)
    )
    root = S.clamp_min(1e-12 * S.max().clamp_min(1e-30)).sqrt()
    A, B = (U / root).mT @ W, U * root
    balance = (norm(B) / norm(A).clamp_min(1e-30)).sqrt().clamp_min(1e-30)
    root_s = math.sqrt(abs(cfg.scale))
    view.lora_A0, view.lora_B0 = A * (balance / root_s), B / (balance * math.copysign(root_s, cfg.scale))


def smallest(M: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """U (m, k) and S (k,) of the k smallest."""
    U, S, _ = thin_svd(M)
    return U[:, -k:] * fix_signs(U[:, -k:]), S[-k:]
