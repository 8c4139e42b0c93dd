"""A layer with its adapters as one function of x, in the order in which the hooks apply them: what merging and
swapped-in weights read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..model.site import Slot
from .layer import DenseView


def composed(slots: Sequence[tuple[Slot, float, DenseView]], w: Tensor, b: Tensor | None) -> Callable[[Any], Tensor]:
    """F(x) = pages(W pages_in(x) + b), W (d_out, d_in). An affine F is x W'ᵀ + b' with b' = F(0) and W'ᵀ = F(I) −
    F(0)."""
    views = []
    for slot, weight, view in slots:
        view.strength = weight
        views.append((slot, 1.0 if slot.own_weight else weight, view))

    def f(x: Any) -> Tensor:
        for slot, weight, view in views:
            if slot.forward_input is not None:
                x = blend(x, slot.forward_input(view, x), weight)
        y = x @ w.mT if b is None else x @ w.mT + b
        for slot, weight, view in views:
            if slot.forward is not None:
                y = blend(y, slot.forward(view, x, y), weight)
        return y

    return f


def blend(old: Tensor, new: Tensor, weight: float) -> Tensor:
    """old + weight (new - old); weight 1 is `new` itself."""
    return new if weight == 1.0 else old + weight * (new - old)
