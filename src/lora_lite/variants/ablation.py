"""Directional ablation: remove the component along a contrast direction from the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..core import ConfigError, Layer, Targets, register
from ._steering import Steering, SteeringConfig, contrast, direction


@dataclass(frozen=True, kw_only=True)
class AblationConfig(SteeringConfig):
    variant: str = "ablation"
    source: int | None = None
    """Which of the adapted blocks (0 the first, -1 the last) gives the one direction that all of them remove, as in the
    paper; None: each removes its own."""


@register
class Ablation(Steering):
    """Directional ablation: a concept is taken out of the residual stream.

    h' = h − α (h·v̂) v̂ after a block, v̂ the unit vector of mean(h⁺) − mean(h⁻) over (positive batch, negative batch)
    pairs at their last token. α is `strength` times the weight in `ll.active(model, {name: w})`: 1 leaves nothing along
    v̂, 2 reflects. Only the outputs of blocks are edited (the paper also edits what attention writes inside of a block,
    and chooses one direction by validation: `source`). Arditi et al. 2024, Refusal in Language Models Is Mediated by a
    Single Direction, arXiv 2406.11717.
    """

    name = "ablation"
    config = AblationConfig
    paper = "2406.11717"
    family = "interventions in the stream"
    also = {"abliteration": ""}
    ignores = ("r", "alpha", "dropout")

    @staticmethod
    def group_init(
        model: nn.Module, targets: Targets[AblationConfig], cfg: AblationConfig, calibration_data: Any
    ) -> None:
        pairs = contrast(targets, calibration_data, cfg.token)
        found = [positive.mean(0) - negative.mean(0) for _, positive, negative in pairs]
        if cfg.source is not None:
            if not -len(found) <= cfg.source < len(found):
                raise ConfigError(f"AblationConfig.source = {cfg.source}: the config chooses {len(found)} blocks.")
            found = [found[cfg.source]] * len(found)
        for view, v in zip(targets, found, strict=True):
            direction(view, v)

    @staticmethod
    def forward(layer: Layer[AblationConfig], x: Tensor, y: Tensor) -> Tensor:
        v = layer.lora_v
        for span in layer.spans(y):
            y = span.add(y, -layer.cfg.strength * (span.take(y) @ v)[..., None] * v)
        return y
