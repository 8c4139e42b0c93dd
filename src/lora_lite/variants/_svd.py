"""Starts from the leading singular triplets of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..core import AdapterConfig, ConfigError
from ..ops.linalg import precise
from ..ops.spectrum import top_svd
from ..ops.svd import randomised_svd


@dataclass(frozen=True, kw_only=True)
class SVDConfig(AdapterConfig):
    """`AdapterConfig` with the choice of the decomposition."""

    svd: Literal["exact", "randomised"] = "exact"
    """"randomised" takes a fraction of the time on large weights; its factors are as good as stored, whatever their
    error."""
    niter: int = 4
    """Rounds of subspace iteration of the randomised decomposition."""

    def validate(self) -> None:
        super().validate()
        if self.niter < 0:
            raise ConfigError(f"{type(self).__name__}.niter must not be negative, got {self.niter}.")


def leading_triplets(layer: Any, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, k), S (k,), V (d_in, k) of the layer's weight in fp32 or better: seeded, signs fixed."""
    W, cfg = precise(layer.weight), layer.cfg
    return top_svd(W, k) if cfg.svd == "exact" else randomised_svd(W, k, cfg.niter, layer.generator("svd"))
