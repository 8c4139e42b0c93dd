"""LoRA-GA: LoRA whose first step is the best step of its rank that full fine-tuning could take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core import AdapterConfig, ConfigError, ParamSpec, Targets, register
from ._deviation import Deviation


@dataclass(frozen=True, kw_only=True)
class LoRAGAConfig(AdapterConfig):
    variant: str = "lora_ga"
    gamma: float = 16.0
    """Larger starts smaller: A0 and B0 are scaled by d_out^¼/√γ."""
    use_rslora: bool = True
    """Scale alpha/√r, for which γ is meant, instead of alpha/r."""

    @property
    def scale(self) -> float:
        return self.effective_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def validate(self) -> None:
        super().validate()
        if not self.gamma > 0:
            raise ConfigError(f"LoRAGAConfig.gamma must be positive, got {self.gamma}.")


@register
class LoRAGA(Deviation):
    """Low-rank update that starts in the singular subspaces of the loss gradient.

    G = ∂loss/∂W (d_out, d_in) over the calibration batches = U S Vᵀ. A0 = c V[:, :r]ᵀ, B0 = c U[:, r:2r], c =
    d_out^¼/√γ. y' = y + s (BA − B0A0) x, s = alpha/√r. The first gradient step then moves W along −(B0B0ᵀG + GA0ᵀA0) ∝
    the best rank-2r part of −G. G = Σ gᵀx from the gradients of outputs: W needs no gradient and is never read, so it
    may be quantised. 2r(d_in + d_out). Wants a tenth of LoRA's learning rate. PEFT's port also multiplies B0 by
    singular values of G and leaves A0 at norm 1. Wang et al. 2024, LoRA-GA: Low-Rank Adaptation with Gradient
    Approximation, arXiv 2407.05000.
    """

    name = "lora_ga"
    config = LoRAGAConfig
    paper = "2407.05000"
    family = "low rank from the weight or from data"
    needs_data = "batches"
    lr = 5e-5
    width_growth = 0.75

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: LoRAGAConfig) -> dict[str, ParamSpec]:
        if 2 * cfg.r > min(d_in, d_out):
            raise ConfigError(f"rank {cfg.r} needs {2 * cfg.r} directions, and a {d_in}->{d_out} weight has fewer.")
        return Deviation.param_specs(d_in, d_out, cfg)

    @staticmethod
    def group_init(model: nn.Module, targets: Targets[LoRAGAConfig], cfg: LoRAGAConfig, calibration_data: Any) -> None:
        for view, U, _, V in targets.each_gradient_svd(calibration_data, lambda view: 2 * view.cfg.r):
            r, c = view.cfg.r, view.out_features**0.25 / view.cfg.gamma**0.5
            view.lora_A0, view.lora_B0 = c * V[:, :r].mT, c * U[:, r:]
