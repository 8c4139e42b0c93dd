"""PEFT's folder layout, both ways: `adapter_config.json` beside `adapter_model.safetensors`.

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
from ..core.config import AdapterConfig
from ..core.errors import FileError, StateError, did_you_mean, listing, shown
from ..core.files import opened, parsed, read_tensors, reading
from ..core.registry import get_variant, variants
from ..runtime.commit import commit
from ..runtime.handle import Adapter
from ..runtime.layers.kinds import kind_named
from ..runtime.layers.linear import dims
from ..runtime.model.record import Record, Target
from ..runtime.model.state import not_merged, record_of, state_of, unwrap
from ..runtime.start.staging import filled
from ..runtime.targets.choose import make_target
from ..runtime.view.expert import layer_views
from .header import check_scale
from .native import check_keys, expected
from .peft_experts import WRAPPED, Pair, expert_factors, packed, unpacked
from .peft_whole import Values, called, full_values, patterns, split_whole, whole_targets
from .places import replaced_folder
from .tensors import write_tensors

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KNOWN = (".lora_A", ".lora_B", ".weight", ".bias")
"""How the names of tensors end, those of modules saved whole included."""
MAX_CONFIG = 16 << 20
"""Bytes of adapter_config.json."""
REFUSED = {
    "use_dora": "DoRA magnitudes",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained token rows",
    "lora_bias": "a bias on B",
    "alora_invocation_tokens": "activated LoRA",
}


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


def load_peft(model: nn.Module, folder: str | os.PathLike[str], name: str, trainable: bool) -> Adapter:
    """Attach a LoRA adapter from a folder in PEFT's layout; every tensor of the file is used, or it raises."""
    folder = Path(folder)
    with reading(folder):
        record, values = _read(model, folder, name)
        check_keys(expected(record), values, str(folder))
    return commit(model, record, filled(model, record, values), trainable)


def _read(model: nn.Module, folder: Path, name: str) -> tuple[Record, dict[str, Tensor]]:
    """The adapter of a folder, and its tensors by key; the model is only looked at."""
    config, modules = _read_config(folder), dict(model.named_modules())
    tensors = _read_tensors(folder, modules)
    saved, tensors = _saved_whole(config, modules, tensors, folder)
    cfg = get_variant("lora").config(
        train_modules=patterns(list(saved)),
        r=config["r"],
        alpha=float(config["lora_alpha"]),
        use_rslora=bool(config.get("use_rslora", False)),  # pyright: ignore[reportCallIssue]
        dropout=float(config.get("lora_dropout") or 0.0),
    )
    pairs = _pairs(tensors, folder)
    of_experts, values = unpacked(model, config, pairs, cfg, folder)
    ranks, alphas = _Overrides(config, "rank_pattern", "r"), _Overrides(config, "alpha_pattern", "lora_alpha")
    targets: dict[str, Target] = {}
    for path, pair in pairs.items():
        size = _checked_size(path, pair, modules, folder)
        own = _with_rank(cfg, path, pair["lora_A"].shape[0], ranks(path), float(alphas(path)), folder)
        targets[path] = make_target(path, *size, own)
    targets |= of_experts
    if not targets:
        raise FileError(f"{folder}: adapter_model.safetensors holds no tensor.")
    whole, differences = whole_targets(saved, modules, cfg, folder)
    record = Record(name, get_variant("lora"), cfg, targets | whole)
    values |= pairs | differences
    return record, {t.key(short): values[path][short] for path, t in record.targets.items() for short in t.specs}


def _saved_whole(
    config: dict[str, Any], modules: dict[str, nn.Module], tensors: dict[str, Tensor], folder: Path
) -> tuple[Values, dict[str, Tensor]]:
    """What the file holds of the modules in `modules_to_save`, and its other tensors."""
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise FileError(f"{folder}: modules_to_save must be a list of names, got {shown(names)}.")
    saved, rest = split_whole(names, modules, tensors, PREFIX)
    if missing := [n for n in names if not any(called(path, [n]) for path in saved)]:
        raise FileError(f"{folder}: modules_to_save names {listing(missing)}, of which the file holds no tensor.")
    return saved, rest


def _pairs(tensors: dict[str, Tensor], folder: Path) -> Values:
    """Path -> its lora_A and lora_B; any other tensor raises."""
    pairs: Values = {}
    for key, t in tensors.items():
        path, dot, letter = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not dot or letter not in ("lora_A", "lora_B"):
            raise _more_than_lora(key, folder)
        pairs.setdefault(path, {})[letter] = t
    return pairs


def _checked_size(path: str, pair: dict[str, Tensor], modules: dict[str, nn.Module], folder: Path) -> tuple[int, int]:
    """(d_in, d_out) of the layer that a pair of factors fits."""
    if path not in modules:
        raise FileError(f"{folder}: the model has no module {path!r}.{did_you_mean(path, modules)}")
    size = dims(modules[path])
    if len(pair) != 2 or size is None:
        raise FileError(f"{folder}: {path} {'has only ' + next(iter(pair)) if size else 'is not a linear layer'}.")
    A, B = pair["lora_A"], pair["lora_B"]
    r = A.shape[0]
    if tuple(A.shape) != (r, size[0]) or tuple(B.shape) != (size[1], r):
        raise FileError(
            f"{folder}: {path} is {size[0]}->{size[1]}, but its factors are {tuple(A.shape)} and {tuple(B.shape)}."
        )
    return size


def _with_rank(cfg: AdapterConfig, path: str, r: int, declared: Any, alpha: float, folder: Path) -> AdapterConfig:
    """The config of one layer, with the rank and the alpha that the patterns say."""
    if r != declared:
        raise FileError(f"{folder}: {path} has rank {r} in the file and {shown(declared)} in adapter_config.json.")
    own = type(cfg)(**{**cfg.to_dict(), "r": r, "alpha": alpha})
    check_scale(own.scale, f"{folder}: {path}")
    return own


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileError(
            f"{folder} holds no adapter_config.json. For lora_lite's own format pass the .safetensors file."
        )
    with path.open("rb") as f:
        text = f.read(MAX_CONFIG + 1)
    if len(text) > MAX_CONFIG:
        raise FileError(f"{path} has more than {MAX_CONFIG} bytes, which no configuration has.")
    config = parsed(text, str(path))
    kind = config.get("peft_type") if isinstance(config, dict) else config
    if not isinstance(config, dict) or kind != "LORA":
        raise FileError(f"{path}: peft_type {shown(kind)} cannot be read; only LORA can.")
    _check_supported(config, path)
    _check_numbers(config, path)
    return config


def _check_supported(config: dict[str, Any], path: Path) -> None:
    """Raise where the folder holds more than plain LoRA."""
    for field, what in REFUSED.items():
        if config.get(field):
            raise FileError(
                f"{path}: {field} is set, and {what} cannot be read from this layout yet. Merge the adapter in PEFT "
                "and load the merged model."
            )
    if config.get("bias", "none") != "none":
        raise FileError(f"{path}: bias={shown(config['bias'])} trains base biases, which is not read.")
    start = config.get("init_lora_weights")
    if start not in (True, False, None, "gaussian", "eva", "orthogonal"):
        raise FileError(
            f"{path}: init_lora_weights={shown(start)} belongs to a base whose weights PEFT changed. "
            "Save it in PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it."
        )


def _check_numbers(config: dict[str, Any], path: Path) -> None:
    for field in ("r", "lora_alpha"):
        if not isinstance(config.get(field), (int, float)) or isinstance(config.get(field), bool):
            raise FileError(f"{path}: {field} must be a number, got {shown(config.get(field))}.")
    for field in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(config.get(field, False), bool):
            raise FileError(f"{path}: {field} must be true or false, got {shown(config[field])}.")
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field) or {}, dict):
            raise FileError(f"{path}: {field} must be a mapping.")


def _read_tensors(folder: Path, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of a folder; nothing is read where some belong to no module of the model."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileError(
            f"{folder} holds no adapter_model.safetensors; pickled adapters (adapter_model.bin) are never read."
        )
    with opened(path) as f:
        keys = list(f.keys())
    for key in keys:
        if not key.endswith(KNOWN):
            raise _more_than_lora(key, folder)
    foreign = [k for k in keys if not _module_of(k) or _module_of(k) not in modules]
    if foreign:
        name = _module_of(foreign[0])
        raise FileError(
            f"{folder}: {len(foreign)} tensors belong to no module of the model: {listing(foreign)}."
            f"{did_you_mean(name, modules)}"
        )
    return read_tensors(path)


def _more_than_lora(key: str, folder: Path) -> FileError:
    return FileError(
        f"{folder}: tensor {shown(key)} is not a lora_A or lora_B weight; this adapter holds more than LoRA, which is "
        "not read."
    )


def _module_of(key: str) -> str:
    """The path of the module to which a tensor of a folder belongs."""
    path, _, letter = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
    if letter not in ("lora_A", "lora_B"):
        path = key.removeprefix(PREFIX).rpartition(".")[0]
    while path.endswith(WRAPPED):
        path = path.removesuffix(WRAPPED)
    return path


class _Overrides:
    """PEFT's overrides of one number by literal module names, `^` in front standing for the whole path; a regular
    expression from a file is never run."""

    def __init__(self, config: dict[str, Any], field: str, default: str) -> None:
        self.default = config[default]
        self.named: dict[str, tuple[int, Any]] = {}
        """Name -> (its place among the patterns, the first of which wins; value)."""
        for key, value in (config.get(field) or {}).items():
            plain = key.removesuffix("$").replace("\\.", ".")
            if any(c in plain.removeprefix("^") for c in "^*+?()[]{}|\\"):
                raise FileError(
                    f"the pattern {shown(key)} of adapter_config.json is a regular expression; only literal module "
                    "names are read from files."
                )
            self.named.setdefault(plain, (len(self.named), value))

    def __call__(self, path: str) -> Any:
        """What holds at a path."""
        parts = path.split(".")
        names = [f"^{path}", *(".".join(parts[i:]) for i in range(len(parts)))]
        return min((self.named[n] for n in names if n in self.named), default=(0, self.default), key=lambda f: f[0])[1]
