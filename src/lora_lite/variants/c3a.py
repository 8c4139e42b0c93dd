"""C3A: an update made of circulant blocks, applied by fast Fourier transforms."""

# torch leaves what these methods of a tensor return undeclared
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant, register
from ..ops.transforms import correlation, spectrum


@dataclass(frozen=True, kw_only=True)
class C3AConfig(AdapterConfig):
    variant: str = "c3a"
    block: int = 256
    """Largest side of a block; the largest common divisor of the layer's widths up to this is taken."""

    def validate(self) -> None:
        super().validate()
        if self.block < 1:
            raise ConfigError(f"C3AConfig.block must be positive, got {self.block}.")


@register
class C3A(Variant):
    """Circular convolution: every b x b block of the update is a circulant matrix.

    y'_m = y_m + (1/d_in) Σ_n w_mn ⋆ x_n over pieces of b, with (w ⋆ x)_k = Σ_j w_(j−k) x_j, indices mod b: a product in
    the Fourier domain. Kernels w (d_out/b, d_in/b, b) = 0 trained, so an exact zero is added at the start; d_in d_out/b
    parameters, rank up to full; r and alpha are not used. Transforms run in fp32 at least. PEFT demands that its block
    (256) divides both widths, and starts at random unless told otherwise; its input gradient convolves with the kernel
    the wrong way around, so that layers below a C3A layer are trained along another direction. About 2 d_in d_out/b +
    (d_in + d_out) log b multiply-adds per token. Chen et al. 2024, Parameter-Efficient Fine-Tuning via Circular
    Convolution, arXiv 2407.19342.
    """

    name = "c3a"
    config = C3AConfig
    paper = "2407.19342"
    family = "spectral and sparse"
    ignores = ("r", "alpha")
    lr = 1e-1
    width_growth = -0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: C3AConfig) -> dict[str, ParamSpec]:
        common = math.gcd(d_in, d_out)
        b = max(i for i in range(1, min(cfg.block, common) + 1) if common % i == 0)
        return {"lora_w": ParamSpec((d_out // b, d_in // b, b), decay=False)}

    @staticmethod
    def forward(layer: Layer[C3AConfig], x: Tensor, y: Tensor) -> Tensor:
        if not y.numel():  # of which no transform can be taken
            return y
        w = layer.tiny("lora_w") / layer.in_features
        pieces: Tensor = layer.dropout(x).to(w.dtype).unflatten(-1, (-1, w.shape[-1]))
        change = correlation(pieces, w, layer.once("spectrum", lambda: spectrum(w)))
        return y + change.flatten(-2).to(y.dtype)
