"""What a merged model remembers, so that `unmerge` can put the bits back."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass
class Original:
    """One layer as it was."""

    path: str
    weight: Tensor | None = None
    """A CPU copy of the bits; None when the whole module was replaced."""
    bias: Tensor | None = None
    had_bias: bool = True
    module: nn.Module | None = None
    """The quantised layer that a dense one replaces."""


@dataclass
class Merged:
    """The adapters in the weights, with their own weights, and the layers as they were."""

    active: tuple[tuple[str, float], ...]
    originals: list[Original] = field(default_factory=list)
