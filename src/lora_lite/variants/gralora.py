"""GraLoRA: a grid of small LoRAs."""

# torch leaves what these methods of a tensor return undeclared
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..core.errors import TargetError
from ..ops.lowrank import lowrank_update
from ..ops.transforms import block_diag


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
    family = "products"
    lr = 2e-3

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
        if g:
            specs["lora_A_general"] = ParamSpec((g, d_in), init="kaiming")
            specs["lora_B_general"] = ParamSpec((d_out, g))
        return specs

    @staticmethod
    def forward(layer: Layer[GraLoRAConfig], x: Tensor, y: Tensor) -> Tensor:
        A, B, s, x = layer.lora_A, layer.lora_B, layer.cfg.scale, layer.dropout(x)
        k, r, _ = A.shape
        z = x.reshape(-1, k, A.shape[-1]).transpose(0, 1) @ A.mT  # (k, tokens, r)
        groups: Tensor = z.unflatten(-1, (k, r // k))
        z = groups.permute(2, 1, 0, 3).flatten(-2)
        y = y + s * (z @ B.mT).transpose(0, 1).reshape(y.shape)
        return lowrank_update(y, x, layer.lora_A_general, layer.lora_B_general, s) if layer.cfg.general else y

    @staticmethod
    def factors(layer: Layer[GraLoRAConfig]) -> tuple[Tensor, Tensor]:
        A, B = layer.lora_A, layer.lora_B
        k, r, _ = A.shape
        wide = block_diag(A.unbind())
        groups: Tensor = B.unflatten(-1, (k, r // k))
        blocks = [block_diag(part.unbind()) for part in groups.unbind(-2)]
        tall = torch.cat(blocks, -1)
        if layer.cfg.general:
            wide, tall = torch.cat((wide, layer.lora_A_general)), torch.cat((tall, layer.lora_B_general), -1)
        return wide, layer.cfg.scale * tall
