"""LoRA-One: LoRA that starts after one gradient step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core import AdapterConfig, ConfigError, ParamSpec, Targets, register
from ._lowrank import LowRank, ScaledConfig


@dataclass(frozen=True, kw_only=True)
class LoRAOneConfig(ScaledConfig):
    variant: str = "lora_one"
    use_rslora: bool = True
    """Scale alpha/√r, for which γ and the rate are meant, instead of alpha/r."""
    gamma: float = 128.0
    """Larger makes the built-in step smaller: s BA = −(s/γ) U (S/S₁) Vᵀ."""

    def validate(self) -> None:
        super().validate()
        if not self.gamma > 0:
            raise ConfigError(f"LoRAOneConfig.gamma must be positive, got {self.gamma}.")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], unknown: list[str] | None = None) -> AdapterConfig:
        """Files from before `use_rslora` hold the scale alpha/r."""
        return super().from_dict({"use_rslora": False, **data}, unknown)


@register
class LoRAOne(LowRank):
    """Low-rank update that starts at the best rank-r part of one gradient step, so a fresh adapter departs from the
    base on purpose.

    G = ∂loss/∂W over the calibration batches = U S Vᵀ; B = −U_r (S_r/S₁)^½/√γ, A = (S_r/S₁)^½ V_rᵀ/√γ; y' = y + s
    (drop(x) Aᵀ) Bᵀ, s = alpha/√r. The singular values over the largest one follow the authors' code (their text writes
    S itself); the authors' command takes r = 8, alpha = 16. r(d_in + d_out). Zhang et al. 2025, LoRA-One: One-Step Full
    Gradient Could Suffice for Fine-Tuning Large Language Models, arXiv 2502.01235.
    """

    name = "lora_one"
    config = LoRAOneConfig
    paper = "2502.01235"
    family = "low rank from the weight or from data"
    needs_data = "batches"
    identity_bound = math.inf
    lr = 2e-4
    width_growth = 0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: LoRAOneConfig) -> dict[str, ParamSpec]:
        if cfg.r > min(d_in, d_out):
            raise ConfigError(f"rank {cfg.r} is more than the gradient of a {d_in}->{d_out} weight has; lower r.")
        return {
            "lora_A": ParamSpec((cfg.r, d_in), init="empty"),
            "lora_B": ParamSpec((d_out, cfg.r), init="empty"),
        }

    @staticmethod
    def group_init(
        model: nn.Module, targets: Targets[LoRAOneConfig], cfg: LoRAOneConfig, calibration_data: Any
    ) -> None:
        for view, U, S, V in targets.each_gradient_svd(calibration_data, lambda view: view.cfg.r):
            if not S[0] > 0:
                raise ConfigError(
                    f"{view.path}: the calibration loss has no gradient there, so A and B would stay 0; add it to "
                    "exclude_names."
                )
            root = (S / S[0] / view.cfg.gamma).sqrt()
            view.lora_A, view.lora_B = (V * root).mT, -U * root
