"""WaveFT: a few coefficients of the update's wavelet transform."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ._sparse import position_spec, positions


@dataclass(frozen=True, kw_only=True)
class WaveFTConfig(AdapterConfig):
    variant: str = "waveft"
    n: int = 2592
    """Trained coefficients per layer, at most all."""
    strength: float = 25.0
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
    lora_at (2, n), drawn once per layer and saved. Coefficient (i, j) adds ± s/2 to the block (i mod h, j mod w), h and
    w half of the widths: the 4n entries are written at once. An odd width is filled up and cut. Other wavelets, which
    PEFT also has, are left out; in PEFT's matrix the two mixed quadrants are exchanged. d_in d_out multiply-adds per
    token. Bilican et al. 2025, Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets, arXiv 2505.12532.
    """

    name = "waveft"
    config = WaveFTConfig
    paper = "2505.12532"
    ignores = ("r", "alpha")
    lr = 3e-4

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: WaveFTConfig) -> dict[str, ParamSpec]:
        n = min(cfg.n, d_in * d_out)
        return {"lora_values": ParamSpec((n,), decay=False), "lora_at": position_spec(d_out, d_in, n)}

    @staticmethod
    def forward(layer: Layer[WaveFTConfig], x: Tensor, y: Tensor) -> Tensor:
        change = layer.once("change", lambda: transformed(layer))
        return y + layer.dropout(x) @ change.mT


def transformed(layer: Layer[WaveFTConfig]) -> Tensor:
    """s H_outᵀ C H_in, (d_out, d_in)."""
    c, (i, j) = layer.lora_values * (layer.cfg.scale / 2), positions(layer)
    d_out, d_in = layer.out_features, layer.in_features
    h, w = -(-d_out // 2), -(-d_in // 2)
    change = c.new_zeros(2 * h, 2 * w)
    for a in (0, 1):
        for b in (0, 1):  # the second of two neighbours has the other sign in a difference
            odd = (a * (i >= h) + b * (j >= w)) % 2 == 1
            place = 2 * (i % h) + a, 2 * (j % w) + b
            change = change.index_put(place, c.where(~odd, -c), accumulate=True)
    return change[:d_out, :d_in]
