"""A model of a few lines with adapters written from their papers, dense and in fp64: an independent reference. It
imports nothing of the library."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
TRAINED = {"lora": "AB", "dylora": "AB", "dora": "ABm", "ia3": "g", "ia3_input": "g", "bitfit": "b"}
"""Method -> the letters of its trained tensors."""
KEPT = {"dora": ("norm",), "dylora": ("b",)}
"""Method -> what else it keeps."""


@dataclass
class Adapter:
    """One adapter as plain tensors: path of a layer -> letter -> tensor; s, its scale, per path."""

    method: str
    tensors: dict[str, Tensors]
    scale: dict[str, float]
    trainable: bool = True

    def copy(self) -> Adapter:
        return Adapter(self.method, {p: dict(t) for p, t in self.tensors.items()}, dict(self.scale), self.trainable)

    def update(self, path: str) -> Tensor:
        """ΔW of a low-rank one."""
        t = self.tensors[path]
        return self.scale[path] * t["B"] @ t["A"]


def input_of(method: str, t: Tensors, x: Tensor) -> Tensor:
    """IA3 on the input side (Liu et al. 2022): l ∘ x, l = 1 + g."""
    return x * (1 + t["g"]) if method == "ia3_input" else x


def output_of(method: str, t: Tensors, s: float, x: Tensor, y: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """What one adapter makes of the output y of a layer (W, b) for the input x."""
    if method in ("lora", "dylora"):  # Hu et al. 2021: W x + s B A x
        return y + x @ (s * t["B"] @ t["A"]).mT
    if method == "dora":  # Liu et al. 2024: m (W + s B A) / ‖W + s B A‖ row by row, no gradient through the norm
        V = W + s * t["B"] @ t["A"]
        g = W.norm(dim=1) * (1 + t["m"]) / V.norm(dim=1).detach()
        return b + g * (y - b) + g * (x @ (s * t["B"] @ t["A"]).mT)
    if method == "ia3":  # l ∘ y
        return y * (1 + t["g"])
    if method == "bitfit":  # Ben Zaken et al. 2021
        return y + t["b"]
    return y


@dataclass
class Model:
    """Embedding, blocks h + down(tanh(up(h))), and a head of the embedding's weight; W and b by path."""

    W: Tensors
    b: Tensors
    blocks: int
    adapters: dict[str, Adapter] = field(default_factory=dict)

    def layer(self, path: str, x: Tensor, active: dict[str, float]) -> Tensor:
        """Every input is rewritten first, then every output, in the order in which the adapters came."""
        W = self.W[path]
        b = self.b.get(path, torch.zeros(len(W), dtype=W.dtype))
        here = [(a, active[n]) for n, a in self.adapters.items() if n in active and path in a.tensors]
        for a, weight in here:
            x = x + weight * (input_of(a.method, a.tensors[path], x) - x)
        y = x @ W.mT + b
        for a, weight in here:
            y = y + weight * (output_of(a.method, a.tensors[path], a.scale[path], x, y, W, b) - y)
        return y

    def __call__(self, ids: Tensor, active: dict[str, float]) -> Tensor:
        h = self.W["embed"][ids]
        for i in range(self.blocks):
            h = h + self.layer(f"layers.{i}.down", self.layer(f"layers.{i}.up", h, active).tanh(), active)
        return self.layer("head", h, active)
