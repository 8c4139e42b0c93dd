"""Files of the original lora-lite: `torch.save({"cfg": cfg, "state": tensors})`, read without running anything."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import FileError, StateError, listing, shown
from ..core.files import reading
from ..core.registry import get_variant
from ..io.native import check_keys, expected
from ..runtime.commit import check_attachable, commit
from ..runtime.handle import Adapter
from ..runtime.layers.kinds import kind_of
from ..runtime.layers.read import weight_norms
from ..runtime.model.record import Record, Target
from ..runtime.model.state import unwrap
from ..runtime.start.staging import filled
from ..runtime.targets.choose import make_target
from ..runtime.targets.loaded import check_loaded
from ..runtime.targets.structure import describe

Tensors = dict[str, Tensor]
ENDINGS = (".pt", ".pth")
SCALE = 2.0
"""alpha / r there where a config says no alpha."""


def is_upstream(path: str | os.PathLike[str]) -> bool:
    """Whether it is a file of `torch.save`."""
    return os.fspath(path).endswith(ENDINGS) and os.path.isfile(path) and zipfile.is_zipfile(path)


def _same(path: str, module: nn.Module, t: Tensors) -> Tensors:
    return t


def _gate(path: str, module: nn.Module, t: Tensors) -> Tensors:
    """The gain there, its difference from 1 here."""
    return {"lora_g": t["lora_g"] - 1}


def _magnitude(path: str, module: nn.Module, t: Tensors) -> Tensors:
    """The length of a row there, its relative change here."""
    norm = weight_norms(module, path, 1).float().cpu()
    return {**t, "lora_m": t["lora_m"].flatten() / norm - 1, "lora_norm": norm}


READ: dict[str, Callable[[str, nn.Module, Tensors], Tensors]] = {
    "lora": _same,
    "ia3": _gate,
    "ia3_ff": _gate,
    "dora": _magnitude,
}
"""Method -> its tensors in the variables of the page here. Of others the file does not say all that they need."""


class _Config:
    """Stands in for a config class of the original, whose fields alone are read."""


def load_upstream(model: nn.Module, path: Path, name: str, trainable: bool) -> Adapter:
    """Attach an adapter that the original lora-lite saved.

    Raises:
        FileError: it holds more than tensors and a config, or a method whose variables are others here.
    """
    model = unwrap(model)
    check_attachable(model, name)
    with reading(path):
        cfg, state = _unpacked(path)
        record, values = _read(model, cfg, state, name)
        check_keys(expected(record), values, str(path))
    return commit(model, record, filled(model, record, values), trainable)


def _unpacked(path: Path) -> tuple[dict[str, Any], Tensors]:
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if strange := [n for n in names if not n.startswith(("lora_lite.", "lora_lite_"))]:
        raise FileError(f"the file would run {listing(strange)}; only tensors and a config are read.")
    with torch.serialization.safe_globals([(_Config, n) for n in names]):
        found = _load(path)
    if not isinstance(found, dict) or not {"cfg", "state"} <= set(found):
        raise FileError('a mapping with "cfg" and "state" is expected; adapters are read from safetensors otherwise.')
    cfg = found["cfg"]
    cfg = dict(vars(cfg)) if isinstance(cfg, _Config) else cfg
    state = found["state"]
    if not isinstance(cfg, dict) or not isinstance(state, dict) or not state:
        raise FileError("the config or the tensors are missing.")
    if not all(isinstance(k, str) and isinstance(t, Tensor) and t.is_floating_point() for k, t in state.items()):
        raise FileError("the state holds more than tensors of floating numbers.")
    return cfg, {k: t.detach().float() for k, t in state.items()}


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read(model: nn.Module, said: dict[str, Any], state: Tensors, name: str) -> tuple[Record, Tensors]:
    variant, r = str(said.get("variant", "lora")), said.get("r", 8)
    if variant not in READ:
        raise FileError(
            f"variant {shown(variant)} keeps other variables here than in the original, which rewrites the base for "
            "some methods; merge it there and load the merged model."
        )
    if type(r) is not int:
        raise FileError(f"r must be a whole number, got {shown(r)}.")
    options: dict[str, Any] = {"r": r}
    if "alpha" not in get_variant(variant).ignores:
        alpha = said.get("alpha")
        options["alpha"] = float(SCALE * r if alpha is None else alpha)
    cfg = get_variant(variant).config(variant=variant, **options)
    layers: dict[str, Tensors] = {}
    for key, t in state.items():
        path, _, short = key.rpartition(".")
        layers.setdefault(path, {})[short] = t
    modules, targets, values = dict(model.named_modules()), dict[str, Target](), dict[str, Tensor]()
    for path, own in layers.items():
        module = modules.get(path)
        kind = None if module is None else kind_of(module)
        if module is None or kind is None:
            raise FileError(f"the model has no layer {shown(path)}.")
        d_in, d_out = kind.size(module) or (0, 0)
        targets[path] = make_target(path, d_in, d_out, cfg, kind.name)
        values |= {f"{path}.{short}": t for short, t in READ[variant](path, module, own).items()}
    if not targets:
        raise StateError("no tensor.")
    check_loaded(describe(model), targets.values())
    return Record(name, get_variant(variant), cfg, targets), values
