"""What the ReFT methods share: a low-rank edit of chosen prompt positions of the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..core import ConfigError, Layer
from ..core.positions import BlockConfig, Since, parse_positions


@dataclass(frozen=True, kw_only=True)
class ReFTConfig(BlockConfig):
    positions: str = "f7+l7"
    """Prompt tokens to edit: "f7+l7" are the first 7 and the last 7, at most n//2 of each in a prompt of n. Also "all",
    "prompt", "generated", "f1", "l1"."""
    share: bool = True
    """One edit for first and last tokens; False trains one for each."""

    def validate(self) -> None:
        super().validate()
        found = parse_positions(self.positions)
        if not self.share and (isinstance(found, (str, Since)) or not all(found)):
            raise ConfigError(
                f"{type(self).__name__}.share=False trains one edit for first and one for last tokens, so positions "
                f"must name both, as in 'f7+l7'; got {self.positions!r}."
            )

    @property
    def edits(self) -> int:
        """Number of separate edits per block."""
        return 1 if self.share else 2


def check_rank(r: int, d: int) -> None:
    """Raise unless r directions fit into d dimensions."""
    if r > d:
        raise ConfigError(f"r = {r} is more than the {d} dimensions of the residual stream.")


def edit(layer: Layer[ReFTConfig], y: Tensor, change: Callable[[Tensor, int], Tensor]) -> Tensor:
    """y + s·change(h, i) at the config's positions, where h are y's vectors there and i numbers the edit."""
    for i, span in enumerate(layer.spans(y, split=not layer.cfg.share)):
        y = span.add(y, layer.cfg.scale * change(layer.dropout(span.take(y)), i))
    return y


def lowrank_edit(layer: Layer[ReFTConfig], y: Tensor, D: str, W: str) -> Tensor:
    """y + s Wᵀ(D h + b) at the config's positions: D and W (edits, r, d) by their names, b the layer's `lora_b`."""
    return edit(layer, y, lambda h, i: (h @ getattr(layer, D)[i].mT + layer.lora_b[i]) @ getattr(layer, W)[i])
