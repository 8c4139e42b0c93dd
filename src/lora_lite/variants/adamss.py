"""AdaMSS: small updates in the span of the leading singular vectors, one for each cluster of outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.linalg import clusters, eigenvectors, thin_svd
from ..ops.lowrank import lowrank_update


@dataclass(frozen=True, kw_only=True)
class AdaMSSConfig(AdapterConfig):
    variant: str = "adamss"
    r: int = 100
    """Leading singular vectors that span the update's inputs; no more than the weight has."""
    subspaces: int = 5
    """Number of clusters K of the outputs."""
    subspace_rank: int = 1
    """Rank k of each cluster's update."""

    def validate(self) -> None:
        super().validate()
        if min(self.subspaces, self.subspace_rank) < 1:
            raise ConfigError(f"AdaMSSConfig: subspaces={self.subspaces} and subspace_rank={self.subspace_rank} >= 1.")


@register
class AdaMSS(Variant):
    """Adaptive multi-subspaces: the outputs are clustered by their rows of U, and each cluster has a rank-k update.

    W ≈ U S Q with the r leading triplets; output j of cluster c(j) becomes y'_j = y_j + B_j A_c Q x, Q (r, d_in)
    frozen, A_c (k, r) starts as the k leading directions of the cluster's rows of U, B (d_out, k) = 0. alpha is not
    used. K·k·r + k·d_out parameters: A Q is multiplied out once per call, so the cost is that of LoRA of rank K k. The
    clusters, by k-means, are saved: PEFT clusters anew at load, decomposes [W b] and moves the bias too. Its pruning of
    clusters during training (ASA) is not here. Zheng et al. 2025, AdaMSS: Adaptive Multi-Subspace Approach for
    Parameter-Efficient Fine-Tuning, NeurIPS 2025, openreview 8ZdWmpYxT0.
    """

    name = "adamss"
    config = AdaMSSConfig
    paper = "openreview 8ZdWmpYxT0"
    family = "low rank from the weight or from data"
    needs_weight = True
    ignores = ("alpha",)
    lr = 5e-3

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: AdaMSSConfig) -> dict[str, ParamSpec]:
        r, K = min(cfg.r, d_in, d_out), min(cfg.subspaces, d_out)
        k = cfg.subspace_rank
        if k > r:
            raise ConfigError(f"subspace_rank = {k} is more than the {r} vectors of a {d_in}->{d_out} weight.")
        return {
            "lora_A": ParamSpec((K, k, r), init="empty"),
            "lora_B": ParamSpec((d_out, k)),
            "lora_Q": ParamSpec((r, d_in), init="empty", as_buffer=True),
            "lora_c": ParamSpec((d_out,), as_buffer=True, dtype=torch.int64, below=K),
        }

    @staticmethod
    def init(layer: Layer[AdaMSSConfig], cfg: AdaMSSConfig) -> None:
        W, (K, k, r) = layer.weight, layer.lora_A.shape
        U, _, V = thin_svd(W.to(torch.promote_types(torch.float32, W.dtype)))
        c = clusters(U[:, :r], K, 10, layer.generator("clusters"))
        leading = [eigenvectors(U[c == i, :r].mT @ U[c == i, :r])[:, -k:].mT.flip(0) for i in range(K)]
        layer.lora_Q, layer.lora_c, layer.lora_A = V[:r], c, torch.stack(leading)

    @staticmethod
    def factors(layer: Layer[AdaMSSConfig]) -> tuple[Tensor, Tensor]:
        K = layer.lora_A.shape[0]
        own = layer.lora_c[:, None] == torch.arange(K, device=layer.lora_c.device)
        B = layer.lora_B[:, None] * own[..., None]
        return (layer.lora_A @ layer.lora_Q).flatten(0, 1), B.flatten(1)

    @staticmethod
    def forward(layer: Layer[AdaMSSConfig], x: Tensor, y: Tensor) -> Tensor:
        return lowrank_update(y, layer.dropout(x), *AdaMSS.factors(layer))
