"""WaveFT: a few coefficients of the update's wavelet transform."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.sparse import sparse_product
from ._sparse import position_spec, positions


@dataclass(frozen=True, kw_only=True)
class WaveFTConfig(AdapterConfig):
    variant: str = "waveft"
    n: int = 2592
    """Trained coefficients per layer, at most all."""
    strength: float = 1.0
    """s; alpha and r are not used."""

    @property
    def scale(self) -> float:
        """s."""
        return self.strength

    def validate(self) -> None:
        super().validate()
        if self.n < 1 or not math.isfinite(self.strength) or self.strength == 0:
            raise ConfigError(f"WaveFTConfig: n={self.n} must be positive, strength={self.strength} finite, not 0.")


@register
class WaveFT(Variant):
    """Wavelet update: n coefficients of a Haar transform, each of which changes a 2 x 2 block of the weight.

    W' = W + s H_outᵀ C H_in, H the orthonormal Haar transform of one level (sums of neighbours over √2, then
    differences), C zero but for lora_values (n) = 0 trained, so an exact zero is added at the start, at the positions
    lora_at (2, n), drawn once per layer and saved. Inputs and outputs are transformed, and neither C nor the update is
    written out; an odd width is filled up and cut. PEFT's strength is 25, which is the same steps of Adam at a rate 25
    times lower. It has other wavelets too, left out here, and exchanges the two mixed quadrants of C. Bilican et al.
    2025, Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets, arXiv 2505.12532.
    """

    name = "waveft"
    config = WaveFTConfig
    paper = "2505.12532"
    family = "spectral and sparse"
    ignores = ("r", "alpha")
    lr = 7.5e-3
    width_growth = -0.75

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: WaveFTConfig) -> dict[str, ParamSpec]:
        n = min(cfg.n, d_in * d_out)
        return {"lora_values": ParamSpec((n,), decay=False), "lora_at": position_spec(d_out, d_in, n)}

    @staticmethod
    def forward(layer: Layer[WaveFTConfig], x: Tensor, y: Tensor) -> Tensor:
        d_out, d_in = layer.out_features, layer.in_features
        values = layer.lora_values * (layer.cfg.scale / 2)
        x = F.pad(layer.dropout(x), (0, 1)) if d_in % 2 else layer.dropout(x)
        left, right = x[..., ::2], x[..., 1::2]
        z = sparse_product(torch.cat((left + right, left - right), -1), values, *positions(layer), d_out + d_out % 2)
        sums, differences = z.chunk(2, -1)
        return y + torch.stack((sums + differences, sums - differences), -1).flatten(-2)[..., :d_out]
