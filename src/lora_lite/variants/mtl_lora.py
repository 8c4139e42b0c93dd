"""MTL-LoRA: a small matrix of each task between a shared A and several B's that the task weighs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import ConfigError, Layer, ParamSpec, Variant, register
from ..ops.lowrank import lowrank_update
from ._lowrank import ScaledConfig


@dataclass(frozen=True, kw_only=True)
class MTLLoRAConfig(ScaledConfig):
    variant: str = "mtl_lora"
    tasks: int = 1
    """Number of tasks; with several, `ll.context(model, task_ids=...)` says that of each row."""
    ups: int = 3
    """Number of B's."""
    temperature: float = 0.5
    """The weights of the B's are softmax(w / temperature)."""

    def validate(self) -> None:
        super().validate()
        if min(self.tasks, self.ups) < 1 or not 1e-3 <= self.temperature <= 1e3:
            raise ConfigError(
                f"MTLLoRAConfig: tasks={self.tasks} and ups={self.ups} begin at 1, temperature={self.temperature} at "
                "0.001."
            )


@register
class MTLLoRA(Variant):
    """Multi-task LoRA: shared factors, and between them what is the task's own.

    y' = y + s Σ_i p_ti B_i Λ_t A drop(x), A (r, d_in) kaiming and B_i (d_out, r) = 0 of all tasks, Λ_t (r, r) = I and
    p_t = softmax(w_t / T) over the B's, w_t ~ N(0, 1) of task t (equal
    weights would keep the B's equal for ever); s = alpha/r. `ll.context(model, task_ids=[0, 2, ...])`
    names the task of each row. The form of `adapters` 1.2, whose own linear layer does not run. r(d_in + n d_out) +
    tasks(r² + n) parameters, r(d_in + d_out + r) multiply-adds per token. Yang et al. 2024, MTL-LoRA: Low-Rank
    Adaptation for Multi-Task Learning, arXiv 2410.09437."""

    name = "mtl_lora"
    config = MTLLoRAConfig
    paper = "2410.09437"
    family = "mixtures and tasks"
    lr = 2e-4

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: MTLLoRAConfig) -> dict[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((cfg.r, d_in), init="kaiming"),
            "lora_B": ParamSpec((cfg.ups, d_out, cfg.r)),
            "lora_L": ParamSpec((cfg.tasks, cfg.r, cfg.r), init=_eyes, decay=False),
            "lora_w": ParamSpec((cfg.tasks, cfg.ups), init=_apart, decay=False),
        }

    @staticmethod
    def forward(layer: Layer[MTLLoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        cfg = layer.cfg
        tasks: Any = layer.context("task_ids") if cfg.tasks > 1 else 0
        p = (layer.lora_w[tasks] / cfg.temperature).softmax(-1)
        B = torch.einsum("...n,nor->...or", p, layer.lora_B) @ layer.lora_L[tasks]
        if cfg.tasks == 1:
            return lowrank_update(y, layer.dropout(x), layer.lora_A, B, cfg.scale)
        z = layer.dropout(x) @ layer.lora_A.mT
        if x.dim() < 3:  # one token per row
            return y + cfg.scale * (z[:, None] @ B.mT)[:, 0]
        return y + cfg.scale * (z @ B.mT)


def _eyes(t: Tensor, g: torch.Generator) -> None:
    t.copy_(torch.eye(t.shape[-1]).expand_as(t))


def _apart(t: Tensor, g: torch.Generator) -> None:
    t.normal_(generator=g)
