"""The scale rule of methods whose update is s B A."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import AdapterConfig


@dataclass(frozen=True, kw_only=True)
class ScaledConfig(AdapterConfig):
    """`AdapterConfig` with the choice between s = alpha/r and s = alpha/√r."""

    use_rslora: bool = False
    """Scale alpha/√r (rsLoRA, arXiv 2312.03732) instead of alpha/r."""

    @property
    def scale(self) -> float:
        return self.effective_alpha / (self.r**0.5 if self.use_rslora else self.r)
