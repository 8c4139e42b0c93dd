"""A layer with its adapters as one function of x, in the order in which the hooks apply them: what merging and
swapped-in weights read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.call import is_one
from ..model.site import Slot
from .layer import DenseView, product


class Composed:
    """F(x) = outputs(x', W x' + b) with x' = inputs(x), W (d_out, d_in). An affine F is x W'ᵀ + b' with b' = F(0) and
    W'ᵀ = F(I) − F(0)."""

    def __init__(self, slots: Sequence[tuple[Slot, float, DenseView]], w: Tensor, b: Tensor | None) -> None:
        self.w, self.b = w, b
        self.views: list[tuple[Slot, float, DenseView]] = []
        for slot, weight, view in slots:
            view.strength = weight
            self.views.append((slot, 1.0 if slot.own_weight else weight, view))

    def __call__(self, x: Any) -> Tensor:
        x = self.inputs(x)
        return self.outputs(x, self.biased(self.product(x)))

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ in x's dtype."""
        return product(x, self.w)

    def biased(self, y: Tensor) -> Tensor:
        """y + b."""
        return y if self.b is None else y + self.b

    def inputs(self, x: Any) -> Any:
        """What the base multiplies with; x itself where no page rewrites it."""
        for slot, weight, view in self.views:
            if slot.forward_input is not None:
                x = blend(x, slot.forward_input(view, x), weight)
        return x

    def outputs(self, x: Any, y: Tensor) -> Tensor:
        """What the pages make of the base's y; y itself where none does anything."""
        for slot, weight, view in self.views:
            if slot.forward is not None:
                y = blend(y, slot.forward(view, x, y), weight)
        return y

    @property
    def rewrites_input(self) -> bool:
        """Whether a page may."""
        return any(slot.forward_input is not None for slot, _, _ in self.views)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A (k, d_in) and B (d_out, k) with outputs(x, y) = y + x Aᵀ Bᵀ, k = 0 where no page has a forward; None where
        one of them is no such product."""
        A, B = [self.w.new_empty(0, self.w.shape[1])], [self.w.new_empty(self.w.shape[0], 0)]
        for slot, weight, view in self.views:
            if slot.forward is None:
                continue
            if slot.factors is None or slot.forward_input is not None:
                return None
            first, second = slot.factors(view)
            A.append(first)
            B.append(weight * second)
        return torch.cat(A), torch.cat(B, 1)

    def feature_maps(self) -> Callable[[Tensor, slice], Tensor] | None:
        """What the pages make of y (n, features), given some of the d_out features and which they are; None where one
        of them is no map of features. Such a map may still mix near features, which `folded` tries."""
        found: list[tuple[Slot, float, tuple[Tensor, ...]]] = []
        for slot, weight, view in self.views:
            if slot.forward is None:
                continue
            if slot.by_feature is None or slot.act is None or slot.own_weight:
                return None
            vectors = slot.by_feature(view, "output")
            if vectors is not None:
                found.append((slot, weight, vectors))
        if any(v.shape != (self.w.shape[0],) for _, _, vectors in found for v in vectors):
            return None

        def maps(y: Tensor, features: slice) -> Tensor:
            for slot, weight, vectors in found:
                assert slot.act is not None
                y = blend(y, slot.act(slot.cfg, y, *(v[features].to(y.dtype) for v in vectors)), weight)
            return y

        return maps


def blend(old: Tensor, new: Tensor, weight: float) -> Tensor:
    """old + weight (new - old); weight 1 is `new` itself."""
    return new if is_one(weight) or new is old else old + weight * (new - old)
