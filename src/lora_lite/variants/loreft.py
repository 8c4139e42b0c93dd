"""LoReFT: rewrite what prompt tokens hold in r orthonormal directions of the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import Layer, ParamSpec, Variant, register
from ..ops.stiefel import fill_orthonormal_rows, orthonormal_rows
from ._reft import ReFTConfig, check_rank, edit


@dataclass(frozen=True, kw_only=True)
class LoReFTConfig(ReFTConfig):
    variant: str = "loreft"


@register
class LoReFT(Variant):
    """Low-rank linear subspace edit of the residual stream at prompt tokens.

    h' = h + s Rᵀ(W h + b − R h) after a block, R (r, d) with orthonormal rows, W (r, d), b (r), s = alpha/r (1 by
    default, as in the paper). Trained are T, D = W − R and b: h' = h + s Rᵀ(D h + b), where R is T with its rows
    orthonormalised in every forward (QR with fixed signs), so R Rᵀ = I whatever the optimiser does. D = b = 0 at the
    start, an exact identity from which D and b learn at once; pyreft draws W apart from R, so that its fresh adapter
    changes the model, and applies its dropout to the whole of h', here to h inside the bracket. Edits the first and
    last tokens of the prompt only (`positions`), never generated ones: no cost while decoding, nothing to merge. Of n
    tokens pyreft edits n//2 at each end, so none of a prompt of one token; so here with "f7+l7", while "l7" alone takes
    all 7 that there are. Wu et
    al. 2024, ReFT: Representation Finetuning for Language Models, arXiv 2404.03592. lr 9e-4, no weight decay.
    2rd multiply-adds per chosen token, and a QR of (d, r) per call.
    """

    name = "loreft"
    config = LoReFTConfig
    paper = "2404.03592"
    family = "interventions in the stream"
    site = "block"
    affine = False
    lr = 9e-4
    width_growth = 0.5

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: LoReFTConfig) -> dict[str, ParamSpec]:
        check_rank(cfg.r, d_out)
        shape = (cfg.edits, cfg.r, d_out)
        return {
            "lora_R": ParamSpec(shape, init=fill_orthonormal_rows, decay=False),
            "lora_D": ParamSpec(shape, decay=False),
            "lora_b": ParamSpec(shape[:2], decay=False),
        }

    @staticmethod
    def forward(layer: Layer[LoReFTConfig], x: Tensor, y: Tensor) -> Tensor:
        def change(h: Tensor, i: int) -> Tensor:
            R = orthonormal_rows(layer.tiny("lora_R")[i]).to(h.dtype)
            return (h @ layer.lora_D[i].mT + layer.lora_b[i]) @ R

        return edit(layer, y, change)
