"""Files of the original lora-lite, its safetensors and its older `torch.save({"cfg": cfg, "state": tensors})`, read
without running anything: their names become PEFT's, and PEFT's table reads them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import FileError, did_you_mean, listing, shown
from ..core.files import opened, parsed, read_tensors, reading
from ..io.peft_read import attach_peft
from ..ops.svd import balanced_factors
from ..runtime.commit import check_attachable
from ..runtime.handle import Adapter
from ..runtime.layers.read import read_weight
from ..runtime.model.state import unwrap

Said = dict[str, Any]
Tensors = dict[str, Tensor]
ENDINGS = (".pt", ".pth")
SCALE = 2.0
"""alpha / r there where a config says no alpha."""


def is_upstream(path: str | os.PathLike[str]) -> bool:
    """Whether it is a file of `torch.save`, or a safetensors file that says its config as the original does."""
    if not os.path.isfile(path):
        return False
    if os.fspath(path).endswith(ENDINGS):
        return zipfile.is_zipfile(path)
    try:
        with opened(path) as f:
            meta = f.metadata() or {}
    except FileError:
        return False
    return "cfg" in meta and "lora_lite" not in meta


def _lora(said: Said, module: nn.Module, path: str, t: Tensors) -> Tensors:
    return {"lora_A.weight": t.pop("lora_A"), "lora_B.weight": t.pop("lora_B")}


def _dora(said: Said, module: nn.Module, path: str, t: Tensors) -> Tensors:
    return {**_lora(said, module, path, t), "lora_magnitude_vector": t.pop("lora_m")}


def _pissa(said: Said, module: nn.Module, path: str, t: Tensors) -> Tensors:
    """s (BA − B0A0): the start, which the original takes off the base, is computed again as it does."""
    A, B = t.pop("lora_A"), t.pop("lora_B")
    U, S, Vh = torch.linalg.svd(read_weight(module, path, torch.float32).cpu(), full_matrices=False)
    A0, B0 = balanced_factors(U[:, : len(A)], S[: len(A)], Vh[: len(A)].mT, _alpha(said) / len(A))
    dtype = getattr(torch, str(said.get("dtype", "float32")).removeprefix("torch."), torch.float32)
    A0, B0 = A0.to(dtype).float(), B0.to(dtype).float()
    return {"lora_A.weight": torch.cat((A, A0)), "lora_B.weight": torch.cat((B, -B0), 1)}


def _delora(said: Said, module: nn.Module, path: str, t: Tensors) -> Tensors:
    names = {"lora_A": "delora_A", "lora_B": "delora_B", "lora_lambda": "delora_lambda", "lora_wnorm": "delora_w_norm"}
    return {theirs: t.pop(own) for own, theirs in names.items()}


def _antipasto(said: Said, module: nn.Module, path: str, t: Tensors) -> Tensors:
    """U (S + ΔS) R Vᵀ − U S Vᵀ, whose U, S, V are in the file."""
    U, S, V = t.pop("lora_U"), t.pop("lora_S"), t.pop("lora_Vh")
    left, right = U, V
    if "lora_rot_T" in t:
        R = _turned(t.pop("lora_rot_T"), int(said.get("block_size", 4)), float(said.get("max_rotation_angle", 0.5)))
        left, right = (U @ R.mT, V) if said.get("rotate_basis", "V") == "U" else (U, R @ V)
    A, B = torch.cat((right, V)), torch.cat((left * (S + t.pop("lora_delta_s")), -U * S), 1)
    return {"lora_A.weight": A, "lora_B.weight": B}


def _turned(entries: Tensor, b: int, angle: float) -> Tensor:
    """Cayley maps of blocks of size b, whose entries are kept below 2 tan(angle/2) by a tanh."""
    rows, columns = torch.triu_indices(b, b, offset=1)
    Q = entries.new_zeros(len(entries), b, b)
    Q[:, rows, columns] = entries / 2
    limit = 2 * torch.tan(torch.tensor(angle / 2))
    X = limit * torch.tanh((Q - Q.mT) / limit) / 2
    eye = torch.eye(b)
    return torch.block_diag(*torch.linalg.solve(eye - X, eye + X))


def _road(said: Said, module: nn.Module, path: str, t: Tensors) -> Tensors:
    return {"road_theta": t.pop("lora_road_theta"), "road_alpha": t.pop("lora_road_alpha")}


Names = Callable[[Said, nn.Module, str, Tensors], Tensors]
READ: dict[str, tuple[str, Names]] = {
    "lora": ("LORA", _lora),
    "eva": ("LORA", _lora),
    "pissa": ("LORA", _pissa),
    "antipasto": ("LORA", _antipasto),
    "dora": ("LORA", _dora),
    "delora": ("DELORA", _delora),
    "hra": ("HRA", lambda said, module, path, t: {"hra_u": t.pop("lora_U").mT}),
    "ia3": ("IA3", lambda said, module, path, t: {"ia3_l": t.pop("lora_g")[:, None]}),
    "ia3_ff": ("IA3", lambda said, module, path, t: {"ia3_l": t.pop("lora_g")[None]}),
    "road": ("ROAD", _road),
}
"""Method -> PEFT's type that holds the same function, and a layer's tensors under its names."""


class _Config:
    """Stands in for a config class of the original, whose fields alone are read."""


def load_upstream(model: nn.Module, path: Path, name: str, trainable: bool) -> Adapter:
    """Attach an adapter that the original lora-lite saved.

    Raises:
        FileError: it holds more than tensors and a config, or a method that is not read.
    """
    check_attachable(model, name)
    model = unwrap(model)
    with reading(path):
        said, state = _unpickled(path) if os.fspath(path).endswith(ENDINGS) else _plain(path)
        config, tensors = _as_peft(model, said, state)
    return attach_peft(model, config, tensors, name, trainable, str(path))


def _plain(path: Path) -> tuple[Said, Tensors]:
    with opened(path) as f:
        said = parsed(f.metadata()["cfg"], f"{path}: the config")
    if not isinstance(said, dict):
        raise FileError("the config is no mapping.")
    return said, {k: t.float() for k, t in read_tensors(path).items()}


def _unpickled(path: Path) -> tuple[Said, Tensors]:
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


def _alpha(said: Said) -> float:
    alpha = said.get("alpha")
    return float(SCALE * said.get("r", 8) if alpha is None else alpha)


def _as_peft(model: nn.Module, said: Said, state: Tensors) -> tuple[Said, Tensors]:
    """adapter_config.json's fields, and the tensors under PEFT's names."""
    variant, r = str(said.get("variant", "lora")), said.get("r", 8)
    if variant not in READ:
        raise FileError(
            f"variant {shown(variant)} of the original is not read, only {', '.join(READ)}; merge it there and load "
            "the merged model."
        )
    if type(r) is not int or r < 1:
        raise FileError(f"r must be a whole number, got {shown(r)}.")
    kind, names = READ[variant]
    modules, layers = dict(model.named_modules()), dict[str, Tensors]()
    for key, t in state.items():
        path, _, short = key.rpartition(".")
        if path not in modules:
            raise FileError(f"the model has no layer {shown(path)}.{did_you_mean(path, modules)}")
        layers.setdefault(path, {})[short] = t
    found: Tensors = {}
    for path, own in layers.items():
        try:
            theirs = names(said, modules[path], path, own)
        except KeyError as e:
            raise FileError(f"{path} holds other variables than {variant!r} has: {e} is missing.") from None
        if own:
            raise FileError(f"{path} holds other variables than {variant!r} has: {listing(own)}.")
        found |= {f"{path}.{name}": t for name, t in theirs.items()}
    config: Said = {"peft_type": kind, "r": r, "lora_alpha": _alpha(said), "use_dora": variant == "dora"}
    if variant in ("pissa", "antipasto"):  # twice the rank: what is added, and what is taken off
        config |= {"r": 2 * r, "lora_alpha": 2 * (_alpha(said) if variant == "pissa" else r)}
    config |= {"feedforward_modules": list(layers) if variant == "ia3_ff" else []}
    config |= {"variant": said.get("road_variant", "road_1"), "group_size": said.get("group_size", 64)}
    return config, found
