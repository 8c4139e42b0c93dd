"""FourierFT: a few coefficients of the update's Fourier transform."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.sparse import sparse_product
from ..ops.transforms import from_frequencies, to_frequencies
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
    """Spectral update: n real coefficients at drawn frequencies of the update's Fourier transform.

    W' = W + s Re F⁻¹(C), C (d_out, d_in) zero but for lora_values (n) = 0 trained, so an exact zero is added at the
    start, at the positions lora_at (2, n), drawn once per layer and saved. F⁻¹ is the inverse discrete Fourier
    transform with its factor 1/(d_in d_out). Inputs are transformed, multiplied with the half of C that its
    Hermitian part needs, and transformed back, in fp32 at least; no matrix is built. PEFT builds it in every call,
    starts at N(0, 1) unless told otherwise, far from the base, and uses the same frequencies in all layers of one
    shape. About n + d_in log d_in + d_out log d_out multiply-adds per token. Gao et al. 2024, Parameter-Efficient
    Fine-Tuning with Discrete Fourier Transform, arXiv 2405.03003.
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
    def forward(layer: Layer[FourierFTConfig], x: Any, y: Tensor) -> Tensor:
        x = layer.dropout(x)
        if isinstance(x, Tensor):
            return y + waves(layer, x).to(y.dtype)
        eye = torch.eye(layer.in_features, dtype=y.dtype, device=y.device)  # for inputs that can only be multiplied
        return y + x @ layer.once("change", lambda: waves(layer, eye).to(y.dtype))


def waves(layer: Layer[FourierFTConfig], x: Tensor) -> Tensor:
    """s Re F⁻¹(C) x: transformed, multiplied with the core, transformed back."""
    values, rows, columns = layer.once("core", lambda: core(layer))
    z = sparse_product(to_frequencies(x.to(values.dtype)), values, rows, columns, 2 * (layer.out_features // 2 + 1))
    return from_frequencies(z, layer.out_features)


def core(layer: Layer[FourierFTConfig]) -> tuple[Tensor, Tensor, Tensor]:
    """C between the halves of two real spectra, (values, rows, columns) by rows: a frequency in the other half is the
    conjugate of its opposite."""
    (i, j), (d_out, d_in) = positions(layer), (layer.out_features, layer.in_features)
    c = layer.tiny("lora_values") * (layer.cfg.scale / d_in)
    c = torch.where(2 * i % d_out == 0, c, c / 2)  # the transform back counts all others twice
    u, v = torch.minimum(i, d_out - i), torch.minimum(j, d_in - j)
    imaginary = torch.where((u == i) == (v == j), -c, c)
    rows, columns = torch.cat((2 * u, 2 * u + 1)), torch.cat((2 * v, 2 * v + 1))
    order = rows.argsort(stable=True)
    return torch.cat((c, imaginary))[order], rows[order], columns[order]
