"""Poly: an inventory of low-rank skills, mixed by each task in its own way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register


@dataclass(frozen=True, kw_only=True)
class PolyConfig(AdapterConfig):
    variant: str = "poly"
    alpha: float | None = 1.0
    tasks: int = 1
    """Number of tasks; with several, `ll.context(model, task_ids=...)` says that of each row."""
    skills: int = 4
    """Number of low-rank pairs per split."""
    splits: int = 1
    """Parts of the inputs and of the outputs that choose their skills apart; more than one is MHR."""

    def validate(self) -> None:
        super().validate()
        if min(self.tasks, self.skills, self.splits) < 1:
            raise ConfigError(f"PolyConfig: tasks={self.tasks}, skills={self.skills}, splits={self.splits} begin at 1.")


@register
class Poly(Variant):
    """Poly (Polytropon) and MHR (multi-head routing): each task mixes K shared low-rank skills, per split of the
    features.

    y' = y + s B_t A_t drop(x), A_t = Σ_k w_tqk A_qk on split q of the inputs, B_t likewise on the outputs, w = σ(l)/Σ_k
    σ(l), l (tasks, splits, K) ~ U(±1e-3), in training with logistic noise on l (relaxed Bernoulli, temperature 1); A
    kaiming, B = 0, s = alpha/r with alpha = 1. `ll.context(model, task_ids=[0, 2, ...])` names the task of each row.
    r·K(d_in + d_out) + tasks·splits·K parameters, r(d_in + d_out) multiply-adds per token and K as many per row. Ponti
    et al. 2022, Combining Modular Skills in Multitask Learning, arXiv 2202.13914; MHR: Caccia et al. 2022, arXiv
    2211.03831."""

    name = "poly"
    config = PolyConfig
    paper = "2202.13914"
    family = "mixtures and tasks"
    also = {"Polytropon": "", "MHR": "splits=2 or more"}
    noisy = True
    lr = 5e-4

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: PolyConfig) -> dict[str, ParamSpec]:
        q, k = cfg.splits, cfg.skills
        if d_in % q or d_out % q:
            raise ConfigError(f"splits={q} does not divide a {d_in}->{d_out} layer.")
        return {
            "lora_A": ParamSpec((q, k, cfg.r, d_in // q), init="kaiming"),
            "lora_B": ParamSpec((q, k, d_out // q, cfg.r)),
            "lora_l": ParamSpec((cfg.tasks, q, k), init=_small, decay=False),
        }

    @staticmethod
    def mixture(layer: Layer[PolyConfig], tasks: Tensor | None) -> Tensor:
        """w (splits, K), or one for each of the rows' tasks."""
        logits = layer.lora_l[0] if tasks is None else layer.lora_l[tasks]
        if layer.training:
            noise = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            logits = logits + noise.logit()
        w = logits.sigmoid()
        return w / w.sum(-1, keepdim=True)

    @staticmethod
    def forward(layer: Layer[PolyConfig], x: Tensor, y: Tensor) -> Tensor:
        many = layer.cfg.tasks > 1
        w = Poly.mixture(layer, layer.context("task_ids") if many else None)
        A = torch.einsum("...qk,qkrd->...rqd", w, layer.lora_A).flatten(-2)
        B = torch.einsum("...qk,qkdr->...qdr", w, layer.lora_B).flatten(-3, -2)
        if many and x.dim() < 3:  # one token per row
            return y + layer.cfg.scale * (((layer.dropout(x)[:, None] @ A.mT) @ B.mT)[:, 0])
        return y + layer.cfg.scale * ((layer.dropout(x) @ A.mT) @ B.mT)


def _small(t: Tensor, g: torch.Generator) -> None:
    t.uniform_(-1e-3, 1e-3, generator=g)
