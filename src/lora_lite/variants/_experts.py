"""Methods made of other adapters: their low-rank factors, copied at attach and laid side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, Variant
from ..ops.linalg import precise
from ..ops.lowrank import add_lowrank, shrink

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(AdapterConfig):
    experts: int = 1
    """Number of adapters; counted at attach."""
    temperature: float = 1.0
    """The scores are divided by it."""

    def validate(self) -> None:
        super().validate()
        if self.experts < 1 or not 1e-3 <= self.temperature <= 1e3:
            raise ConfigError(
                f"{type(self).__name__}: experts={self.experts} begins at 1, temperature={self.temperature} at 1e-3."
            )


class OfAdapters(Variant):
    """What all methods declare that are made of other adapters: they start as a mixture of them, not as the base."""

    needs_data = "adapters"
    identity_bound = torch.inf
    ignores = ("alpha",)

    @staticmethod
    def group_init(model: Any, targets: Any, cfg: Any, data: Any) -> None:
        for _ in copied(targets, cfg, data):
            pass


def expert_specs(d_in: int, d_out: int, cfg: ExpertsConfig) -> dict[str, ParamSpec]:
    """`lora_A` (E, r, d_in) and `lora_B` (E, d_out, r), frozen and saved."""
    shapes = {"lora_A": (cfg.experts, cfg.r, d_in), "lora_B": (cfg.experts, d_out, cfg.r)}
    return {name: ParamSpec(shape, init="empty", as_buffer=True) for name, shape in shapes.items()}


def copied(targets: Any, cfg: ExpertsConfig, data: Any, **changes: Any) -> Iterator[tuple[Any, list[Pair]]]:
    """Every layer on which an expert stands, with the pairs that were copied to it; the others are left out.

    Raises:
        ConfigError: the data are no factors of adapters, or not of these layers.
    """
    experts: list[Any] = list(data)
    paths: set[str] = {layer.path for layer in targets}
    if not experts or not all(isinstance(one, Mapping) and paths & {*one} for one in experts):
        raise ConfigError(
            f"{cfg.variant} is made of other adapters, each with a pair of factors for some of the chosen layers: "
            f"ll.attach(model, ll.{type(cfg).__name__}(), [ll.factors(model, name) for name in names])."
        )
    for layer in list(targets):
        pairs: list[Pair | None] = [one.get(layer.path) for one in experts]
        if not any(pairs):
            targets.remove(layer)
            continue
        layer.resize(r=max(len(pair[0]) for pair in pairs if pair is not None), experts=len(pairs), **changes)
        found = [_expert(layer, pair) for pair in pairs]
        layer.lora_A, layer.lora_B = (torch.stack(side) for side in zip(*found, strict=True))
        yield layer, found


def _expert(layer: Any, pair: Pair | None) -> Pair:
    """A and B padded to the layer's rank; zeros for an expert that does not stand here."""
    (_, r, d_in), (_, d_out, _) = layer.lora_A.shape, layer.lora_B.shape
    if pair is None:
        return torch.zeros(r, d_in), torch.zeros(d_out, r)
    A, B = (precise(t.detach()).cpu() for t in pair)
    if A.shape[1] != d_in or B.shape != (d_out, len(A)):
        raise ConfigError(
            f"{layer.path}: an expert brings A {tuple(A.shape)} and B {tuple(B.shape)}, not of this layer."
        )
    return F.pad(A, (0, 0, 0, r - len(A))), F.pad(B, (0, r - len(A)))


def narrowed(layer: Layer[Any], x: Tensor) -> Tensor:
    """A_e drop(x) of every expert: (..., E, r)."""
    return shrink(layer.dropout(x), layer.lora_A.flatten(0, 1)).view(*x.shape[:-1], *layer.lora_A.shape[:2])


def mixed(layer: Layer[Any], y: Tensor, z: Tensor, p: Tensor) -> Tensor:
    """y + Σ_e p_e B_e z_e for p (..., E), z (..., E, r), without a (..., E, d_out) between."""
    return add_lowrank(y, (p[..., None] * z).flatten(-2), wide(layer))


def wide(layer: Layer[Any]) -> Tensor:
    """[B_1 ... B_E]: (d_out, E r)."""
    return layer.lora_B.transpose(0, 1).flatten(1)
