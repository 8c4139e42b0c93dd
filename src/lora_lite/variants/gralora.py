"""GraLoRA: a grid of small LoRAs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.config import AdapterConfig
from ..core.errors import ConfigError, TargetError
from ..core.registry import register
from ..core.spec import ParamSpec
from ..core.variant import Variant
from ..ops.lowrank import lowrank_update


@dataclass(frozen=True, kw_only=True)
class GraLoRAConfig(AdapterConfig):
    variant: str = "gralora"
    k: int = 2
    """Pieces on either side of the weight; divides r and both widths."""
    general: int = 0
    """Rank of a plain LoRA of the whole weight beside the grid (hybrid GraLoRA)."""

    @property
    def scale(self) -> float:
        """s = alpha/(r + general)."""
        return self.effective_alpha / (self.r + self.general)

    def validate(self) -> None:
        super().validate()
        if self.k < 1 or self.general < 0 or self.r % self.k:
            raise ConfigError(f"GraLoRAConfig needs k ≥ 1 that divides r, general ≥ 0; got k={self.k}, r={self.r}.")


@register
class GraLoRA(Variant):
    """Granular low-rank update: k x k blocks of the weight, each with a LoRA of rank r/k of its own.

    z_i = A_i x_i for the k pieces of x, A_i (r, d_in/k) ~ U(±1/√(d_in/k)); rank group j of every z_i goes to output
    piece j: y'_j = y_j + s B_j (z_1j, …, z_kj), B_j (d_out/k, r) = 0, so an exact zero is added at the start. s =
    alpha/(r + general). LoRA's number of parameters and operations, rank up to k r. `general` adds s B (A x) of that
    rank. Jung et al. 2025, GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning, arXiv 2505.20355.
    """

    name = "gralora"
    config = GraLoRAConfig
    paper = "2505.20355"
    lr = 2e-3
    cost = "(r + general)(d_in + d_out)"

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: GraLoRAConfig) -> dict[str, ParamSpec]:
        k, g = cfg.k, cfg.general
        if d_in % k or d_out % k:
            raise TargetError(
                f"k={k} does not divide both widths of a {d_in}->{d_out} layer; choose a common divisor, or leave "
                "the layer out by target_kinds or exclude_names."
            )
        specs = {
            "lora_A": ParamSpec((k, cfg.r, d_in // k), init="kaiming"),
            "lora_B": ParamSpec((k, d_out // k, cfg.r)),
        }
        general = (
            {"lora_A_general": ParamSpec((g, d_in), init="kaiming"), "lora_B_general": ParamSpec((d_out, g))}
            if g
            else {}
        )
        return specs | general

    @staticmethod
    def forward(layer, x, y):
        A, B, s, x = layer.lora_A, layer.lora_B, layer.cfg.scale, layer.dropout(x)
        k, r, _ = A.shape
        z = x.reshape(-1, k, A.shape[-1]).transpose(0, 1) @ A.mT  # (k, tokens, r)
        z = z.unflatten(-1, (k, r // k)).permute(2, 1, 0, 3).flatten(-2)
        y = y + s * (z @ B.mT).transpose(0, 1).reshape(y.shape)
        return lowrank_update(y, x, layer.lora_A_general, layer.lora_B_general, s) if layer.cfg.general else y

    @staticmethod
    def factors(layer):
        A, B = layer.lora_A, layer.lora_B
        k, r, _ = A.shape
        wide = torch.block_diag(*A)
        blocks = [torch.block_diag(*part) for part in B.unflatten(-1, (k, r // k)).unbind(-2)]
        tall = torch.cat(blocks, -1)
        if layer.cfg.general:
            wide, tall = torch.cat((wide, layer.lora_A_general)), torch.cat((tall, layer.lora_B_general), -1)
        return wide, layer.cfg.scale * tall
