"""PCA steering: add the direction along which contrast pairs differ most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core import Targets, register
from ..ops.linalg import thin_svd
from ._steering import Steering, SteeringConfig, contrast, direction


@dataclass(frozen=True, kw_only=True)
class PCASteeringConfig(SteeringConfig):
    variant: str = "pca_steering"


@register
class PCASteering(Steering):
    """Steering along the first principal direction of the differences of contrast pairs, as in representation
    engineering.

    h' = h + α m v̂ after a block. The rows of D (n, d) are the differences h⁺ − h⁻ of n pairs at their last token; v̂
    is the top eigenvector of DᵀD, turned so that most pairs have D_i v̂ > 0, and m = mean |D_i v̂|. α is `strength`
    times the weight in `ll.active(model, {name: w})`. D is not centred: the mean difference is the signal, and centring
    (repeng's `pca_diff`) removes just that, leaving the direction in which the pairs disagree. Zou et al. 2023,
    Representation Engineering: A Top-Down Approach to AI Transparency, arXiv 2310.01405.
    """

    name = "pca_steering"
    config = PCASteeringConfig
    paper = "2310.01405"
    family = "interventions in the stream"
    also = {"RepE": ""}
    ignores = ("r", "alpha", "dropout")

    @staticmethod
    def group_init(
        model: nn.Module, targets: Targets[PCASteeringConfig], cfg: PCASteeringConfig, calibration_data: Any
    ) -> None:
        for view, positive, negative in contrast(targets, calibration_data, cfg.token):
            D = positive - negative
            v = thin_svd(D)[2][0]
            along = D @ v
            votes = along.sign().sum()
            v = -v if (votes if votes != 0 else along.sum()) < 0 else v
            direction(view, v * along.abs().mean())
