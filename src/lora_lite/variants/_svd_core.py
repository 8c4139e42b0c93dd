"""Methods that train a small core between frozen singular vectors of the weight: a page says what C − S is, nothing
more."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core import Layer, ParamSpec, Variant
from ..ops.lowrank import add_lowrank, shrink
from ..ops.orthogonal import cayley_minus_identity, skew
from ._svd import leading_triplets


class SVDCore(Variant):
    """W = U S Vᵀ + rest, W' = U C Vᵀ + rest for k triplets and a core C (k, k): y' = y + ((x V) (C − S)ᵀ) Uᵀ; k = r, or
    all that W has.

    Frozen and saved: `lora_U` (d_out, k), `lora_S` (k,), `lora_V` (k, d_in), its rows the right singular vectors. The
    weight itself never changes, and C − S is built without cancellation, so it is an exact zero at the start.
    """

    needs_weight: ClassVar[bool] = True

    @staticmethod
    def change(layer: Layer[Any]) -> Tensor:
        """C − S, (k, k), or its diagonal (k,), in fp32 or better."""
        raise NotImplementedError

    @staticmethod
    def init(layer: Layer[Any], cfg: Any) -> None:
        U, S, V = leading_triplets(layer, layer.lora_S.shape[0])
        layer.lora_U, layer.lora_S, layer.lora_V = U, S, V.mT

    @classmethod  # which core is meant is known to the page that inherits
    def forward(  # pyright: ignore[reportIncompatibleVariableOverride]
        cls, layer: Layer[Any], x: Tensor, y: Tensor
    ) -> Tensor:
        z = shrink(layer.dropout(x), layer.lora_V)
        change = layer.once("change", lambda: cls.change(layer).to(y.dtype))
        return add_lowrank(y, z * change if change.dim() == 1 else z @ change.mT, layer.lora_U)

    @classmethod
    def factors(  # pyright: ignore[reportIncompatibleVariableOverride]
        cls, layer: Layer[Any]
    ) -> tuple[Tensor, Tensor]:
        change = cls.change(layer)
        U = layer.tiny("lora_U")
        return layer.lora_V, (U * change if change.dim() == 1 else U @ change).to(layer.lora_U.dtype)


def triplets(d_in: int, d_out: int, cfg: Any) -> int:
    """k: r, or all triplets of a weight that has fewer."""
    return min(cfg.r, d_in, d_out)


def basis_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ParamSpec]:
    """The frozen triplets."""
    k = triplets(d_in, d_out, cfg)
    return {
        "lora_U": ParamSpec((d_out, k), init="empty", as_buffer=True),
        "lora_S": ParamSpec(
            (k,), init="empty", as_buffer=True, dtype=torch.promote_types(torch.float32, cfg.torch_dtype)
        ),
        "lora_V": ParamSpec((k, d_in), init="empty", as_buffer=True),
    }


def rotation_spec(k: int) -> dict[str, ParamSpec]:
    """`lora_Q`: the upper triangle of a skew-symmetric (k, k), zero; nothing for k = 1, which cannot rotate."""
    return {"lora_Q": ParamSpec((k * (k - 1) // 2,), decay=False)} if k > 1 else {}


def rotation_change(layer: Any) -> Tensor:
    """E = R − I of the Cayley rotation R that `lora_Q` parametrises, (k, k)."""
    S = layer.tiny("lora_S")
    k = S.shape[0]
    return cayley_minus_identity(skew(layer.tiny("lora_Q"), k)) if k > 1 else S.new_zeros(1, 1)
