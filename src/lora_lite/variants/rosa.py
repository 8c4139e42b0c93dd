"""RoSA: a sparse and a low-rank update side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Targets, Variant, register
from ..ops.lowrank import lowrank_update
from ..ops.sparse import sparse_product
from ._sparse import largest, positions


@dataclass(frozen=True, kw_only=True)
class RoSAConfig(AdapterConfig):
    variant: str = "rosa"
    r: int = 16
    share: float = 0.006
    """Share of the weight's entries that the sparse part trains."""

    def validate(self) -> None:
        super().validate()
        if not 0 < self.share <= 1:
            raise ConfigError(f"RoSAConfig.share must lie in (0, 1], got {self.share}.")


@register
class RoSA(Variant):
    """Robust adaptation: LoRA, and trained numbers where the loss asks most for them.

    W' = W + S + s BA, A (r, d_in) ~ U(±1/√d_in), B (d_out, r) = 0, s = alpha/r; S zero but for n = ⌊share · d_in d_out⌋
    numbers lora_values = 0 at the places lora_at (2, n) of the largest |∂loss/∂W|, the mean over the calibration
    batches (the authors take one batch; over several, the mean of squares). An exact zero is added at the start, S is
    never written out, and W is never read. A and B learn at 3.5 times the rate of S, as the authors have it. Nikdan et
    al. 2024, RoSA: Accurate Parameter-Efficient Fine-Tuning via Robust Adaptation, arXiv 2401.04679.
    """

    name = "rosa"
    config = RoSAConfig
    paper = "2401.04679"
    family = "spectral and sparse"
    needs_data = "batches"
    lr = 2e-4
    width_growth = 0.25

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: RoSAConfig) -> dict[str, ParamSpec]:
        n = int(cfg.share * d_in * d_out)
        if n < 1:
            raise ConfigError(f"share={cfg.share} leaves no entry of a {d_in}->{d_out} weight; raise it.")
        return {
            "lora_A": ParamSpec((cfg.r, d_in), init="kaiming", lr_ratio=3.5),
            "lora_B": ParamSpec((d_out, cfg.r), lr_ratio=3.5),
            "lora_values": ParamSpec((n,)),
            "lora_at": ParamSpec((2, n), init="empty", as_buffer=True, dtype=torch.int32),
        }

    @staticmethod
    def group_init(model: nn.Module, targets: Targets[RoSAConfig], cfg: RoSAConfig, calibration_data: Any) -> None:
        for view, G in targets.each_gradient(calibration_data):
            view.lora_at = largest(G, view.lora_values.shape[0])

    @staticmethod
    def forward(layer: Layer[RoSAConfig], x: Tensor, y: Tensor) -> Tensor:
        x = layer.dropout(x)
        y = y + sparse_product(x, layer.lora_values, *positions(layer), layer.out_features)
        return lowrank_update(y, x, layer.lora_A, layer.lora_B, layer.cfg.scale)
