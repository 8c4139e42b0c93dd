"""The gradient of one weight, summed over tokens: kept as its tokens while they are few beside the weight's sides."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.spectrum import product_svd, top_svd

FEW = 4
"""Tokens are few while the weight's shorter side has at least so many features for each."""


class Gradient:
    """G = Σ gᵀx (d_out, d_in) over tokens with inputs x (n, d_in) and gradients of outputs g (n, d_out)."""

    def __init__(self, d_out: int, d_in: int) -> None:
        self.shape = (d_out, d_in)
        self.n = 0
        self.share = 1.0
        """What G is multiplied with in the end: one over the number of batches."""
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._sum: Tensor | None = None

    def add(self, g: Tensor, x: Tensor) -> None:
        """Count some tokens, in fp32 or better."""
        self.n += x.shape[0]
        if self._sum is None and FEW * self.n <= min(self.shape):
            self._pairs.append((g.clone(), x.clone()))
            return
        self._fold()
        self._fold_one(g, x)

    def _fold(self) -> None:
        for g, x in self._pairs:
            self._fold_one(g, x)
        self._pairs.clear()

    def _fold_one(self, g: Tensor, x: Tensor) -> None:
        if self._sum is None:
            self._sum = g.new_zeros(self.shape)
        self._sum.addmm_(g.mT, x)

    @property
    def finite(self) -> bool:
        """Whether every number is."""
        tensors = [t for pair in self._pairs for t in pair] if self._sum is None else [self._sum]
        return all(bool(torch.isfinite(t).all()) for t in tensors)

    def dense(self) -> Tensor:
        """G itself."""
        self._fold()
        assert self._sum is not None
        return self._sum * self.share

    def leading(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The k largest singular triplets: U (d_out, k), S (k,), V (d_in, k), signs fixed."""
        if self._sum is None and k <= self.n:
            g, x = (torch.cat(parts) for parts in zip(*self._pairs, strict=True))
            return product_svd(g.mT * self.share, x.mT, k)
        return top_svd(self.dense(), k, decays=True)
