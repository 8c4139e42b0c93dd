"""CAA: add the mean difference of contrast pairs to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core import Targets, register
from ._steering import Steering, SteeringConfig, contrast, direction


@dataclass(frozen=True, kw_only=True)
class CAAConfig(SteeringConfig):
    variant: str = "caa"


@register
class CAA(Steering):
    """Contrastive activation addition: a steering vector that is fitted, not trained.

    h' = h + α v after a block, v = mean(h⁺) − mean(h⁻) over the rows of (positive batch, negative batch) pairs at their
    last token; α is `strength` times the weight in `ll.active(model, {name: w})`, and weight 0 is the bare base. Kept
    as the unit vector and ‖v‖. All chosen blocks are fitted on the untouched model and each adds its own v: with many
    blocks the shifts add up, so the paper steers one (`layers=(13,)`). The paper adds v after the prompt only
    (positions="generated"); the default is every token. Rimsky et al. 2023, Steering Llama 2 via Contrastive Activation
    Addition, arXiv 2312.06681.
    """

    name = "caa"
    config = CAAConfig
    paper = "2312.06681"
    family = "interventions in the stream"
    ignores = ("r", "alpha", "dropout")

    @staticmethod
    def group_init(model: nn.Module, targets: Targets[CAAConfig], cfg: CAAConfig, calibration_data: Any) -> None:
        for view, positive, negative in contrast(targets, calibration_data, cfg.token):
            direction(view, positive.mean(0) - negative.mean(0))
