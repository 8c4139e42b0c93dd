"""PEFT's folder layout, written: `adapter_config.json` beside `adapter_model.safetensors`.

Export writes the one form that every reader of that layout understands alike: one rank everywhere (zero-padded), the
scale folded into B, lora_alpha = r as integers, no patterns, and zero tensors for the layers of an adapted kind that
this adapter leaves out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._version import __version__
from ..core.errors import FileError, StateError, listing
from ..core.registry import variants
from ..runtime.layers.kinds import kind_named
from ..runtime.layers.linear import dims
from ..runtime.model.record import Record
from ..runtime.model.state import not_merged, record_of, state_of, unwrap
from ..runtime.view.expert import layer_views
from .peft_experts import Pair, expert_factors, packed
from .peft_read import CONFIG, PREFIX, WEIGHTS
from .peft_whole import full_values
from .places import replaced_folder
from .tensors import write_tensors


def export(
    model: nn.Module, folder: str | os.PathLike[str], name: str | None = None, format: Literal["peft"] = "peft"
) -> Path:
    """Write one adapter for PEFT, vLLM, llama.cpp and others: exact for every method whose update is of low rank.

    Args:
        folder: made if it is not there. An adapter in it is replaced at once, so that a killed process leaves the old
            or the new one; its other files stay.
        format: "peft".

    Raises:
        StateError: the method's update is not a pair of low-rank factors (merge it instead), or the model is merged.
        FileError: the folder cannot be written; what was in it is as it was.
    """
    if format != "peft":
        raise FileError(f"format must be 'peft', got {format!r}.")
    model = unwrap(model)
    record = record_of(model, name)
    not_merged(state_of(model), "ll.export")
    _check_exportable(record)
    factors, of_experts = _factors(model, record)
    r = max(A.shape[0] for A, _ in (*factors.values(), *(pair for pairs in of_experts.values() for pair in pairs)))
    stacked, parameters = packed(model, of_experts, r)
    tensors = _padded(model, factors, r) | stacked
    with torch.no_grad():
        tensors |= full_values(model, record)
    config = _config(model, record, list(factors), parameters, r)
    folder = Path(folder)
    with replaced_folder(folder, WEIGHTS) as new:
        write_tensors(
            new / WEIGHTS,
            {f"{PREFIX}{key}": t for key, t in tensors.items()},
            {"format": "pt", "written_by": f"lora_lite {__version__}"},
        )
        with (new / CONFIG).open("w") as f:
            f.write(json.dumps(config, indent=2, sort_keys=True) + "\n")
            f.flush()
            os.fsync(f.fileno())
    return folder


def _check_exportable(record: Record) -> None:
    if record.variant.factors is None:
        able = [v.name for v in variants() if v.factors is not None]
        raise StateError(
            f"adapter {record.name!r}: an update of variant {record.variant.name!r} is no pair of low-rank factors, "
            "so the LoRA layout cannot hold it. Export the merged model (ll.merge, then model.save_pretrained), or "
            f"use one of {', '.join(able)}."
        )
    own = [t for t in record.targets.values() if t not in record.beside]
    other = [t.path for t in own if not kind_named(t.kind).plain_vectors]
    if other:
        raise StateError(
            f"adapter {record.name!r} also adapts {listing(other)}, which this export does not write; merge it and "
            "export the model."
        )


@torch.no_grad()
def _factors(model: nn.Module, record: Record) -> tuple[dict[str, Pair], dict[str, list[Pair]]]:
    """Path -> (A, s B) of the linear layers, and path -> those of every expert."""
    views = layer_views(model, record)
    linear = [v for v in views if not record.targets[v.path].experts]
    factors = {v.path: _on_cpu(*record.variant.factors(v)) for v in linear}  # type: ignore[misc]
    return factors, expert_factors(record.variant, [v for v in views if record.targets[v.path].experts])


def _on_cpu(A: Tensor, B: Tensor) -> Pair:
    return A.detach().float().cpu(), B.detach().float().cpu()


def _kinds(paths: Iterable[str]) -> list[str]:
    """The layers' own names, which PEFT calls modules: "q_proj", "up"."""
    return sorted({path.rsplit(".", 1)[-1] for path in paths})


def _padded(model: nn.Module, factors: dict[str, Pair], r: int) -> dict[str, Tensor]:
    """Factors of rank r of every layer with an adapted layer's name, zero-padded; zeros where it has no adapter."""
    tensors: dict[str, Tensor] = {}
    kinds = _kinds(factors)
    for path, module in model.named_modules():
        size = dims(module)
        if size is None or path.rsplit(".", 1)[-1] not in kinds:
            continue
        A, B = factors.get(path, (torch.zeros(0, size[0]), torch.zeros(size[1], 0)))
        pad = r - A.shape[0]
        tensors[f"{path}.lora_A.weight"] = torch.cat((A, A.new_zeros(pad, size[0]))).contiguous()
        tensors[f"{path}.lora_B.weight"] = torch.cat((B, B.new_zeros(size[1], pad)), 1).contiguous()
    return tensors


def _config(model: nn.Module, record: Record, linear: list[str], parameters: list[str], r: int) -> dict[str, Any]:
    """adapter_config.json for these linear layers and these parameters of fused experts."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if hasattr(model, "generate") else None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "target_modules": _kinds(linear),
        **({"target_parameters": parameters} if parameters else {}),
        "bias": "none",
        "fan_in_fan_out": any(type(model.get_submodule(p)).__name__ == "Conv1D" for p in linear),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": [t.path for t in record.beside] or None,
    }
