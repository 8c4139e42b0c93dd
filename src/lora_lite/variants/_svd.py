"""Starts from the leading singular triplets of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..core import AdapterConfig, ConfigError
from ..ops.linalg import precise
from ..ops.spectrum import top_svd
from ..ops.svd import randomised_svd

NEAR = 0.01
"""‖Wᵀu − σv‖/σ of a triplet that is near enough to start from."""


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


def leading_triplets(layer: Any, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, k), S (k,), V (d_in, k) of the layer's weight in fp32 or better: reproducible, signs fixed."""
    W, cfg = precise(layer.weight), layer.cfg
    if cfg.svd == "randomised":
        return randomised_svd(W, k, cfg.niter, layer.generator("svd"))
    return top_svd(W, k, near=NEAR if cfg.svd == "auto" else None)
