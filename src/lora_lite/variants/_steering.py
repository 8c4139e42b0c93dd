"""What steering methods share: hidden states of contrast pairs, and the strength at which a fitted direction acts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from ..core import AdapterConfig, ConfigError, Layer, ParamSpec, StagedLayer, Targets, Variant
from ..core.positions import BlockConfig
from ..ops.linalg import norm, precise

Config = TypeVar("Config", bound=AdapterConfig)
FORM = (
    "calibration_data of a steering method is a list of pairs (positive batch, negative batch) with equally many rows"
)


@dataclass(frozen=True, kw_only=True)
class FittedConfig(AdapterConfig):
    strength: float = 1.0
    """Factor of the effect, which the weight in `ll.active(model, {name: w})` multiplies; negative steers the other
    way."""
    token: Literal["last", "mean"] = "last"
    """What stands for a row of the pairs: its last token that is no padding, or the mean of all of them."""

    def validate(self) -> None:
        super().validate()
        if not math.isfinite(self.strength):
            raise ConfigError(f"{type(self).__name__}.strength must be finite, got {self.strength}.")


@dataclass(frozen=True, kw_only=True)
class SteeringConfig(FittedConfig, BlockConfig):
    """Config of a direction in the residual stream. `layers` selects the blocks; papers often steer one in the
    middle."""


class Steering(Variant):
    """A method that is fitted from contrast pairs and not trained: a unit vector and a length per block."""

    site = "block"
    needs_data = "pairs"
    affine = False
    identity_bound = math.inf

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: SteeringConfig) -> dict[str, ParamSpec]:
        return {
            "lora_v": ParamSpec((d_out,), init="empty", as_buffer=True),
            "lora_norm": ParamSpec((1,), init="empty", as_buffer=True),
        }

    @staticmethod
    def forward(layer: Layer[Any], x: Tensor, y: Tensor) -> Tensor:
        v = layer.cfg.strength * layer.tiny("lora_norm") * layer.tiny("lora_v")
        for span in layer.spans(y):
            y = span.add(y, v)
        return y


def contrast(targets: Targets[Config], data: Any, token: str) -> Iterator[tuple[StagedLayer[Config], Tensor, Tensor]]:
    """(view, positive (n, d), negative (n, d)) in fp32 or better: what stands for each row in every target's output on
    the untouched model."""
    kind = type(data).__name__
    if isinstance(data, (Mapping, Tensor, str)):
        raise ConfigError(f"{FORM}; got {kind}.")
    pairs = cast("Iterable[object]", data)
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {view.path: ([], []) for view in targets}
    side = 0

    def batches() -> Iterator[Any]:
        nonlocal side
        for pair in pairs:
            for side, batch in enumerate(_sides(pair)):  # noqa: B007  (visit reads it)
                yield batch

    def visit(view: StagedLayer[Config], x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        found[view.path][side].append(_row_vectors(view.path, y, mask, token))

    targets.stream_whole(batches(), visit)
    for view in targets:
        sides = found.pop(view.path)
        if [len(t) for t in sides[0]] != [len(t) for t in sides[1]] or not sides[0]:
            raise ConfigError(
                f"{view.path}: {FORM}; here the two sides have {sum(map(len, sides[0]))} and "
                f"{sum(map(len, sides[1]))} rows."
            )
        yield view, torch.cat(sides[0]), torch.cat(sides[1])


def _sides(pair: object) -> Sequence[Any]:
    """The positive and the negative batch of a pair."""
    sides = cast("Sequence[Any]", pair) if isinstance(pair, (tuple, list)) else ()
    if len(sides) != 2:
        raise ConfigError(f"{FORM}; got a {type(cast(object, pair)).__name__} instead of a pair.")
    return sides


def direction(view: Layer[Any], v: Tensor) -> None:
    """Keep v as a unit vector and a length."""
    length = check_difference(view, v)
    view.lora_v, view.lora_norm = v / length, length.reshape(1)


def check_difference(view: Layer[Any], v: Tensor) -> Tensor:
    """‖v‖ of a difference between the two sides; raises where they do not differ."""
    length = norm(v)
    if not bool(length > 0) or not bool(torch.isfinite(length)):
        raise ConfigError(
            f"{view.path}: positive and negative hidden states do not differ there, so they give no direction. "
            "Look at the pairs (does their last token tell them apart?), set token='mean', or leave the layer out."
        )
    return length


def _row_vectors(path: str, h: Tensor, mask: Tensor | None, token: str) -> Tensor:
    if mask is not None and h.dim() == 2 and h.shape[0] == mask.numel():
        h = h.view(*mask.shape, -1)
    if h.dim() != 3 or (mask is not None and mask.shape != h.shape[:2]):
        raise ConfigError(
            f"{path}: its output {tuple(h.shape)} has not the shape (batch, tokens, d), so no token of a row can be "
            "named; exclude it."
        )
    h = precise(h.detach()).cpu()
    mask = torch.ones(h.shape[:2], dtype=torch.bool) if mask is None else mask.cpu()
    if not bool(mask.any(1).all()):
        raise ConfigError(f"{path}: a row of the calibration data holds nothing but padding.")
    if token == "mean":
        return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    last = (mask * torch.arange(1, mask.shape[1] + 1)).argmax(1)
    return h[torch.arange(len(h)), last]
