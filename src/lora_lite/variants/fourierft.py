"""FourierFT: a few coefficients of the update's Fourier transform."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.transforms import irfft2
from ._sparse import position_spec, positions


@dataclass(frozen=True, kw_only=True)
class FourierFTConfig(AdapterConfig):
    variant: str = "fourierft"
    n: int = 1000
    """Trained coefficients per layer, at most all."""
    strength: float = 150.0
    """s; alpha and r are not used."""

    @property
    def scale(self) -> float:
        """s."""
        return self.strength

    def validate(self) -> None:
        super().validate()
        if self.n < 1 or not math.isfinite(self.strength) or self.strength == 0:
            raise ConfigError(f"FourierFTConfig: n={self.n} must be positive, strength={self.strength} finite, not 0.")


@register
class FourierFT(Variant):
    """Spectral update: n real coefficients at drawn frequencies, transformed into a dense matrix.

    W' = W + s Re F⁻¹(C), C (d_out, d_in) zero but for lora_values (n) = 0 trained, so an exact zero is added at the
    start, at the positions lora_at (2, n), drawn once per layer and saved. F⁻¹ is the inverse discrete Fourier
    transform with its factor 1/(d_in d_out), in fp32 at least; its real part is the inverse transform of the Hermitian
    part of C, of which half of the columns do. PEFT starts at N(0, 1) unless told otherwise, far from the base, and
    uses the same frequencies in all layers of one shape. d_in d_out log(d_in d_out) multiply-adds once per call; in
    training a plain layer multiplies with W' once, otherwise d_in d_out more per token. Gao et al. 2024,
    Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, arXiv 2405.03003.
    """

    name = "fourierft"
    config = FourierFTConfig
    paper = "2405.03003"
    family = "spectral and sparse"
    ignores = ("r", "alpha")
    lr = 3e-2
    width_growth = -1.75

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: FourierFTConfig) -> dict[str, ParamSpec]:
        n = min(cfg.n, d_in * d_out)
        return {"lora_values": ParamSpec((n,), decay=False), "lora_at": position_spec(d_out, d_in, n)}

    @staticmethod
    def forward(layer: Layer[FourierFTConfig], x: Tensor, y: Tensor) -> Tensor:
        change = layer.once("change", lambda: transformed(layer).to(y.dtype))
        return y + layer.dropout(x) @ change.mT

    @staticmethod
    def weight(layer: Layer[FourierFTConfig], W: Tensor) -> Tensor:
        return W + transformed(layer).to(W.dtype)


def transformed(layer: Layer[FourierFTConfig]) -> Tensor:
    """s Re F⁻¹(C), (d_out, d_in)."""
    c, (i, j) = layer.tiny("lora_values"), positions(layer)
    d_out, d_in = layer.out_features, layer.in_features
    half = d_in // 2
    rows = torch.cat((i, -i % d_out))  # every frequency and its opposite hold half of the coefficient
    columns = torch.cat((j, -j % d_in))
    shares = torch.cat((c, c)) * (columns <= half) * (layer.cfg.scale / 2)
    C = c.new_zeros(d_out, half + 1).index_put((rows, columns.clamp_max(half)), shares, accumulate=True)
    return irfft2(torch.complex(C, torch.zeros_like(C)), d_out, d_in)
