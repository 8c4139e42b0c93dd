"""Layouts of diffusers, kohya and MLX-LM, written: the low-rank factors of every layer, the scale folded into B."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..core.errors import StateError, listing
from ..runtime.model.record import Record
from .adapted import Adapted, Pair, adapted_layers
from .other_layouts import METADATA, MLX_WEIGHTS, numbered
from .peft import nearest_factors, refused
from .peft_tables.written import lora_names
from .places import replaced_folder
from .tensors import write_tensors

Tensors = dict[str, Tensor]
WEIGHTS = "pytorch_lora_weights.safetensors"


def write_other(
    model: nn.Module, record: Record, folder: Path, form: str, rank: int | None, prefix: str | None
) -> Path:
    """Write the folder in the layout `form`."""
    layers = adapted_layers(model, record)
    if record.beside or any(t.experts for t in record.targets.values()):
        where = [t.path for t in record.targets.values() if t in record.beside or t.experts]
        raise refused(record, f"{listing(where)} is trained whole or is a bank of experts, which {form} does not take")
    part = prefix if prefix is not None else part_of(model)
    if form == "mlx" and record.cfg.variant == "dora" and rank is None:
        return _mlx(model, layers, {x.path: _dora_pair(x) for x in layers}, folder, dora=True)
    pairs = nearest_factors(record, layers, rank)
    if form == "mlx":
        return _mlx(model, layers, pairs, folder)
    tensors, meta = (_diffusers if form == "diffusers" else _kohya)(layers, pairs, part)
    with replaced_folder(folder, WEIGHTS) as new:
        tensors = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
        write_tensors(new / WEIGHTS, tensors, {"format": "pt", "written_by": f"lora_lite {__version__}", **meta})
    return folder


def part_of(model: nn.Module) -> str:
    """The part of a pipeline that a model is, by the name of its class."""
    name = type(model).__name__
    if "UNet" in name:
        return "unet"
    return "text_encoder" if "Text" in name and "Transformer" not in name else "transformer"


def _diffusers(layers: list[Adapted], pairs: dict[str, Pair], part: str) -> tuple[Tensors, dict[str, str]]:
    before = f"{part}." if part else ""
    tensors = {f"{before}{x.path}.{name}": t for x in layers for name, t in _named(x, pairs[x.path]).items()}
    ranks = {path: A.shape[0] for path, (A, _) in pairs.items()}
    r = max(ranks.values())
    config = {
        "r": r,
        "lora_alpha": r,
        "rank_pattern": {path: n for path, n in ranks.items() if n != r},
        "alpha_pattern": {path: n for path, n in ranks.items() if n != r},
        "target_modules": sorted(ranks),
        "use_dora": False,
        "lora_bias": False,
    }
    return tensors, {METADATA: json.dumps({f"{before}{k}": v for k, v in config.items()}, sort_keys=True)}


def _kohya(layers: list[Adapted], pairs: dict[str, Pair], part: str) -> tuple[Tensors, dict[str, str]]:
    short = {"unet": "lora_unet", "transformer": "lora_transformer", "text_encoder": "lora_te"}.get(part, part)
    tensors: Tensors = {}
    for layer in layers:
        name = f"{short}_{layer.path.replace('.', '_')}"
        factors = _named(layer, pairs[layer.path])
        tensors[f"{name}.lora_down.weight"] = factors["lora_A.weight"]
        tensors[f"{name}.lora_up.weight"] = factors["lora_B.weight"]
        tensors[f"{name}.alpha"] = torch.tensor(float(pairs[layer.path][0].shape[0]))
    return tensors, {"ss_network_module": "networks.lora"}


def _named(layer: Adapted, pair: Pair) -> Tensors:
    found = lora_names(layer, *pair)
    if "lora_A.weight" not in found:
        raise StateError(f"{layer.path}: this layout holds no embedding.")
    return found


def _dora_pair(layer: Adapted) -> Pair:
    return layer["lora_A"], layer.cfg.scale * layer["lora_B"]


def _mlx(model: nn.Module, layers: list[Adapted], pairs: dict[str, Pair], folder: Path, dora: bool = False) -> Path:
    """One rank, scale 1, and names inside of a block."""
    r = max(A.shape[0] for A, _ in pairs.values())
    tensors: Tensors = {}
    keys: dict[str, None] = {}
    for layer in layers:
        place = numbered(layer.path)
        if place is None or not layer.kind.plain_vectors:
            raise StateError(f"{layer.path} is no linear layer of a numbered block, which alone MLX-LM adapts.")
        keys[place[1]] = None
        A, B = pairs[layer.path]
        tensors[f"{layer.path}.lora_a"] = torch.cat((A, A.new_zeros(r - len(A), A.shape[1]))).mT
        tensors[f"{layer.path}.lora_b"] = torch.cat((B, B.new_zeros(len(B), r - B.shape[1])), 1).mT
        if dora:
            tensors[f"{layer.path}.m"] = layer["lora_norm"] * (1 + layer["lora_m"])
    blocks = {n[0] for n in (numbered(path) for path, _ in model.named_modules()) if n is not None}
    config: dict[str, Any] = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": max(blocks) + 1,
        "lora_parameters": {"rank": r, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    with replaced_folder(folder, MLX_WEIGHTS) as new:
        write_tensors(new / MLX_WEIGHTS, {k: t.contiguous() for k, t in tensors.items()}, {"format": "pt"})
        (new / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder
