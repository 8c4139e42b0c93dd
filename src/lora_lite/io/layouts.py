"""The forms in which low-rank factors are written for other libraries: names, transposition, the files beside them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..core.errors import StateError, listing

PREFIX = "base_model.model."
"""Before the names of PEFT's tensors."""
WEIGHTS = "adapter_model.safetensors"
"""PEFT's file of tensors."""
Tensors = dict[str, Tensor]
Config = dict[str, Any]


class Layout(NamedTuple):
    """One form."""

    weights: str
    """The name of the file of tensors."""
    written: Callable[[nn.Module, Tensors, Config], tuple[Tensors, Config]]
    """(model, `path.lora_A.weight` (r, d_in) and `path.lora_B.weight` (d_out, r) with the scale in B, PEFT's config) ->
    what is written: tensors, and the config or nothing."""


def _peft(model: nn.Module, tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    return {f"{PREFIX}{key}": t for key, t in tensors.items()}, config


def _diffusers(model: nn.Module, tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """PEFT's names after that of the pipeline's component. The scale is 1 where the file names none."""
    _check_factors_only(tensors, config, "diffusers")
    component = "unet" if "unet" in type(model).__name__.lower() else "transformer"
    return {f"{component}.{key}": t for key, t in tensors.items()}, {}


def _mlx(model: nn.Module, tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """`path.lora_a` (d_in, r) and `path.lora_b` (r, d_out); layers are named within their block, and every block has
    them."""
    _check_factors_only(tensors, config, "MLX-LM")
    found = {key: re.match(r"(.*\.)?layers\.(\d+)\.(.+)\.lora_[AB]\.weight$", key) for key in tensors}
    outside = sorted({key.rsplit(".lora_", 1)[0] for key, match in found.items() if match is None})
    if outside:
        raise StateError(f"MLX-LM adapts layers of blocks only, and this adapter acts on {listing(outside)} as well.")
    blocks = {int(match[2]) for match in found.values() if match}
    names = {match[3] for match in found.values() if match}
    renamed = {
        key.replace(".lora_A.weight", ".lora_a").replace(".lora_B.weight", ".lora_b"): t.T.contiguous()
        for key, t in tensors.items()
    }
    parameters = {"rank": config["r"], "scale": 1.0, "dropout": 0.0, "keys": sorted(names)}
    return renamed, {"fine_tune_type": "lora", "num_layers": max(blocks) + 1, "lora_parameters": parameters}


def _check_factors_only(tensors: Tensors, config: Config, reader: str) -> None:
    """Raise where there is more than pairs of factors of linear layers.

    Raises:
        StateError: modules trained whole, or fused experts.
    """
    others = [key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    others += config.get("target_parameters") or []
    if others:
        raise StateError(f"{reader} reads factors of linear layers only, and this adapter holds {listing(others)}.")


LAYOUTS = {
    "peft": Layout(WEIGHTS, _peft),
    "diffusers": Layout("pytorch_lora_weights.safetensors", _diffusers),
    "mlx": Layout("adapters.safetensors", _mlx),
}
