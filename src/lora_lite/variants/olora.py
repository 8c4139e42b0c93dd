"""OLoRA: LoRA that starts from an orthonormal basis of the weight's first columns."""

from __future__ import annotations

from dataclasses import dataclass

from ..core import Layer, register
from ..ops.linalg import precise
from ..ops.stiefel import orthonormal_rows
from ._deviation import Deviation
from ._lowrank import ScaledConfig


@dataclass(frozen=True, kw_only=True)
class OLoRAConfig(ScaledConfig):
    variant: str = "olora"


@register
class OLoRA(Deviation):
    """Low-rank update that starts from the QR decomposition of the weight.

    W = QR with a positive diagonal of R; B0 = Q[:, :r] (d_out, r), A0 = R[:r] (r, d_in); y' = y + s (BA − B0A0) x with
    A = A0 + ΔA, B = B0 + ΔB. Q[:, :r] spans the first r columns of W, so only these are decomposed, and A0 = B0ᵀ W: no
    SVD, no whole QR. The paper and PEFT replace W by W − s B0A0; here W stays as it is. Büyükakyüz 2024, OLoRA:
    Orthonormal Low-Rank Adaptation of Large Language Models, arXiv 2406.01775.
    """

    name = "olora"
    config = OLoRAConfig
    paper = "2406.01775"
    family = "low rank from the weight or from data"
    needs_weight = True
    lr = 5e-4
    width_growth = 0.5

    @staticmethod
    def init(layer: Layer[OLoRAConfig], cfg: OLoRAConfig) -> None:
        W = precise(layer.weight)
        Qt = orthonormal_rows(W[:, : cfg.r].mT)
        layer.lora_A0, layer.lora_B0 = Qt @ W, Qt.mT
