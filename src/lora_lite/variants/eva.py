"""EVA: LoRA that starts from the directions in which a layer's inputs vary, with ranks moved to where they explain
most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core import AdapterConfig, ConfigError, ParamSpec, Targets, register
from ._lowrank import LowRank


@dataclass(frozen=True, kw_only=True)
class EVAConfig(AdapterConfig):
    variant: str = "eva"
    rho: float = 2.0
    """Largest rank that a target may get, over r; the mean stays r. 1 leaves every target at r."""
    tokens: Literal["all", "labelled"] = "all"
    """Which tokens count besides padding, which never does: "labelled" leaves out those with label -100."""
    centre: bool = False
    """Take the mean input off first, as the authors' code and PEFT do: the directions in which inputs differ."""

    def validate(self) -> None:
        super().validate()
        if not 1 <= self.rho < math.inf:
            raise ConfigError(f"EVAConfig.rho must be finite and at least 1, got {self.rho}.")


@register
class EVA(LowRank):
    """Low-rank update that starts from the principal directions of its inputs.

    y' = y + s (drop(x) Aᵀ) Bᵀ as in LoRA; the rows of A (r, d_in) are the top right singular vectors of the layer's
    inputs X (tokens, d_in), B = 0. They are the leading eigenvectors of XᵀX, summed over the calibration data, so the
    weight is never read and a quantised base serves as well. Over all targets the Σr directions with the largest
    σᵢ²/‖X‖² are kept, at most ρr per target; a target that keeps none is left out, and s stays what it was. Signs are
    fixed, so the start is deterministic. The inputs are not centred unless `centre`, which the authors' code and PEFT
    do. Same cost as LoRA. Paischer et al. 2024, One Initialization to Rule them All: Fine-tuning via Explained Variance
    Adaptation, arXiv 2410.07170.
    """

    name = "eva"
    config = EVAConfig
    paper = "2410.07170"
    family = "low rank from the weight or from data"
    needs_data = "batches"
    lr = 1e-3
    width_growth = 0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: EVAConfig) -> dict[str, ParamSpec]:
        return {"lora_A": ParamSpec((cfg.r, d_in), init="empty"), "lora_B": ParamSpec((d_out, cfg.r))}

    @staticmethod
    def group_init(model: nn.Module, targets: Targets[EVAConfig], cfg: EVAConfig, calibration_data: Any) -> None:
        budget = sum(view.cfg.r for view in targets)
        directions: dict[str, Tensor] = {}
        shares: dict[str, Tensor] = {}
        for gram in targets.each_gram(calibration_data, labelled=cfg.tokens == "labelled"):
            sizes = {v.path: min(v.in_features, int(cfg.rho * v.cfg.r)) for v in gram.views}
            e, V = gram.leading(max(sizes.values()), cfg.centre)
            total = gram.trace - (gram.sum.square().sum() / gram.n if cfg.centre else 0.0)
            for view in gram.views:
                if gram.n < view.cfg.r:
                    raise ConfigError(
                        f"{view.path}: the calibration data has {gram.n} tokens, too few for rank {view.cfg.r}."
                    )
                directions[view.path] = V.mT[: sizes[view.path]]
                shares[view.path] = (e / total.clamp_min(1e-30)).cpu()[: sizes[view.path]]
        owner = torch.cat([torch.full((len(shares[v.path]),), i) for i, v in enumerate(targets)])
        best = torch.cat([shares[v.path] for v in targets]).argsort(descending=True, stable=True)[:budget]
        ranks = [int(n) for n in torch.bincount(owner[best], minlength=len(targets))]
        for view, r in list(zip(targets, ranks, strict=True)):
            if r == 0:
                targets.remove(view)
                continue
            if r != view.cfg.r:
                view.resize(r=r, alpha=view.cfg.scale * r)
            view.lora_A = directions[view.path][:r]
