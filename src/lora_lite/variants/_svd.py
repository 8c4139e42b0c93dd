"""Starts from the leading singular triplets of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..core import AdapterConfig, ConfigError
from ..ops.krylov import OVERSAMPLE, krylov_fits
from ..ops.linalg import precise
from ..ops.spectrum import SHARE, top_svd
from ..ops.svd import randomised_svd

NEAR = 0.01
"""‖Wᵀu − σv‖/σ of a triplet that is near enough to start from."""
DENSE_FLOPS, THIN_FLOPS = 5e10, 1.5e10
"""Operations a second of one core that a plan reckons with, for products of whole matrices and with thin ones."""
WORTH_SAYING = 5.0
"""Seconds of a start from which on a plan tells."""


@dataclass(frozen=True, kw_only=True)
class SVDConfig(AdapterConfig):
    """`AdapterConfig` with the choice of the decomposition."""

    svd: Literal["auto", "exact", "randomised"] = "auto"
    """"auto" is exact where that is quick; of large weights it takes triplets with a residual below 1 % of their
    singular value, which keep the best rank-k part to about a thousandth. "exact" goes on until rounding, "randomised"
    stops after `niter` rounds. The factors are as good as stored, whatever their error."""
    niter: int = 4
    """Rounds of subspace iteration of the randomised decomposition."""

    def validate(self) -> None:
        super().validate()
        if self.niter < 0:
            raise ConfigError(f"{type(self).__name__}.niter must not be negative, got {self.niter}.")

    def start_note(self, shapes: Sequence[tuple[int, int]]) -> str | None:
        """Which decomposition, how long and how exact, where that is more than some seconds."""
        seconds = sum(self._seconds(*shape) for shape in shapes)
        if seconds < WORTH_SAYING:
            return None
        if self.svd == "randomised":
            how = f"{self.niter} rounds of subspace iteration, which find flat spectra only roughly"
        elif self.svd == "auto" and any(self._thin(*shape) for shape in shapes):
            how = "within about a thousandth of the best; svd='exact' goes on until rounding"
        else:
            how = "exact"
        return f"the start decomposes {len(shapes)} weights: about {seconds:,.0f} s of one core, {how}"

    def _thin(self, d_in: int, d_out: int) -> bool:
        """Whether thin products are enough."""
        return self.svd == "randomised" or krylov_fits(self.r, min(d_in, d_out) // SHARE)

    def _seconds(self, d_in: int, d_out: int) -> float:
        """Roughly, of one core: a dense decomposition, or products with a thin block."""
        short, long = sorted((d_in, d_out))
        if not self._thin(d_in, d_out):
            return (2 * short**2 * long + 12 * short**3) / DENSE_FLOPS
        columns = {"auto": 16, "exact": 36, "randomised": self.niter + 2}[self.svd] * (self.r + OVERSAMPLE)
        return 4 * columns * d_in * d_out / THIN_FLOPS


def leading_triplets(layer: Any, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, k), S (k,), V (d_in, k) of the layer's weight in fp32 or better: reproducible, signs fixed."""
    W, cfg = precise(layer.weight), layer.cfg
    if cfg.svd == "randomised":
        return randomised_svd(W, k, cfg.niter, layer.generator("svd"))
    return top_svd(W, k, near=NEAR if cfg.svd == "auto" else None)
