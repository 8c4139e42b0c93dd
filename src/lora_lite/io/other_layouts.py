"""Files of diffusers, kohya, LyCORIS and MLX-LM, read: their names become PEFT's, and PEFT's table reads them."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.errors import FileError, LoraLiteWarning, did_you_mean, listing, shown
from ..core.files import opened, parsed, read_tensors, reading
from ..runtime.handle import Adapter
from ..runtime.model.surroundings import own_surroundings
from .peft_read import MAX_CONFIG, PREFIX, attach_peft

Tensors = dict[str, Tensor]
MLX_WEIGHTS = "adapters.safetensors"
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Parts of a pipeline, as diffusers names them before a module's path."""
KOHYA = ("lora_unet_", "lora_transformer_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te_", "lycoris_")
"""What stands before a module's path, whose dots are underscores."""
PARTS = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "lora.down.weight": "lora_A.weight",
    "lora.up.weight": "lora_B.weight",
    "lora_linear_layer.down.weight": "lora_A.weight",
    "lora_linear_layer.up.weight": "lora_B.weight",
    "dora_scale": "lora_magnitude_vector",
    "alpha": "alpha",
    "lora_A.weight": "lora_A.weight",
    "lora_B.weight": "lora_B.weight",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
"""What stands behind a module's path -> PEFT's name for it."""
METADATA = "lora_adapter_metadata"


def is_other(path: str | os.PathLike[str]) -> bool:
    """Whether a safetensors file is of one of these layouts."""
    if not os.path.isfile(path) or not os.fspath(path).endswith(".safetensors"):
        return False
    try:
        with opened(path) as f:
            meta, keys = f.metadata() or {}, list(f.keys())
    except FileError:
        return False
    return "lora_lite" not in meta and any(_split(k) is not None or k.endswith((".lora_a", ".lora_b")) for k in keys)


def load_other(model: nn.Module, path: Path, name: str, trainable: bool) -> Adapter:
    """Attach the adapter of such a file.

    Raises:
        FileError: a tensor belongs to no module of the model, or a layout's own facts are missing.
    """
    with own_surroundings(), reading(path):
        with opened(path) as f:
            meta, keys = f.metadata() or {}, list(f.keys())
        paths = [p for p, _ in model.named_modules() if p]
        if any(k.endswith((".lora_a", ".lora_b")) for k in keys):
            config, found = _mlx(path, set(paths))
        else:
            config, found = _named(read_tensors(path), keys, paths, meta)
    return attach_peft(model, config, found, name, trainable, str(path))


def _split(key: str) -> tuple[str, str] | None:
    """(what names the module, PEFT's name of the tensor)."""
    for end, part in PARTS.items():
        if key.endswith(f".{end}") and not key.startswith(PREFIX):
            return key.removesuffix(f".{end}"), part
    return None


def _named(tensors: Tensors, keys: list[str], paths: list[str], meta: dict[str, str]) -> tuple[dict[str, Any], Tensors]:
    """Config and tensors by PEFT's names of a file of diffusers or kohya."""
    split = {k: _split(k) for k in keys}
    if strange := [k for k, s in split.items() if s is None]:
        raise FileError(f"tensors of no adapter that is read: {listing(strange)}.")
    names = dict.fromkeys(s[0] for s in split.values() if s is not None)
    places, component = _places(list(names), paths)
    found: Tensors = {}
    alphas: dict[str, float] = {}
    for key, s in split.items():
        if s is None or s[0] not in places:
            continue
        place, part = places[s[0]], s[1]
        if part == "alpha":
            alphas[place] = float(tensors[key].float().reshape(()))
        else:
            found[f"{place}.{part}"] = tensors[key]
    return _config(found, alphas, _metadata(meta, component)), found


def _places(names: list[str], paths: list[str]) -> tuple[dict[str, str], str]:
    """(name -> path of the module in this model, the part of a pipeline that the model is). A file may hold other
    parts too, which are left out and said.

    Raises:
        FileError: the model is none of the parts.
    """
    plain, joined = {path: path for path in paths}, {path.replace(".", "_"): path for path in paths}
    parts: dict[str, dict[str, str | None]] = {}
    for name in names:
        part = _part(name)
        known = joined if part in KOHYA else plain
        parts.setdefault(part, {})[name] = known.get(name.removeprefix(part))
    fitting = [part for part, found in parts.items() if None not in found.values()]
    if len(fitting) != 1:
        part = max(parts, key=lambda p: sum(v is not None for v in parts[p].values()))
        absent = [n for n, v in parts[part].items() if v is None] or names
        hint = did_you_mean(absent[0].removeprefix(part), joined if part in KOHYA else plain)
        raise FileError(
            f"{len(absent)} of its names belong to no module of this model: {listing(absent)}.{hint} Load it into the "
            "part of the pipeline that it adapts (pipe.unet, pipe.transformer, pipe.text_encoder)."
        )
    others = [part for part in parts if part not in fitting]
    if others:
        warnings.warn(
            f"what the file holds for {listing(p.strip('._') for p in others)} is not loaded: this model is the "
            f"{fitting[0].strip('._')}.",
            LoraLiteWarning,
            stacklevel=6,
        )
    return {n: p for n, p in parts[fitting[0]].items() if p is not None}, fitting[0].strip(".")


def _part(name: str) -> str:
    """What stands in front of a module's path and says the part of a pipeline; nothing where none is named."""
    fronts = (*KOHYA, *(f"{c}." for c in COMPONENTS))
    return next((front for front in fronts if name.startswith(front)), "")


def _metadata(meta: dict[str, str], component: str) -> dict[str, Any]:
    """What diffusers writes into the header: PEFT's config, its names with the part of the pipeline in front."""
    if METADATA not in meta:
        return {}
    said = parsed(meta[METADATA], METADATA)
    if not isinstance(said, dict):
        raise FileError(f"{METADATA} must be a mapping, got {shown(said)}.")
    short = {k.removeprefix(f"{component}."): v for k, v in said.items()}
    return {k: v for k, v in short.items() if k in ("lora_alpha", "alpha_pattern", "use_rslora")}


def _config(tensors: Tensors, alphas: dict[str, float], said: dict[str, Any]) -> dict[str, Any]:
    """adapter_config.json for these tensors, whose ranks are what they are."""
    if any(".hada_" in k for k in tensors):
        return _product("LOHA", {k: t.shape[1] for k, t in tensors.items() if k.endswith("hada_w1_a")}, alphas)
    if any(".lokr_" in k for k in tensors):
        return _kronecker(tensors, alphas)
    config = as_lora(tensors)
    if any(k.endswith("lora_magnitude_vector") for k in tensors):
        config["use_dora"] = True
        _check_magnitudes(tensors)
    if said:  # ranks are what the tensors have
        return config | {"alpha_pattern": {}} | said
    return config | {"alpha_pattern": config["alpha_pattern"] | {f"^{path}": a for path, a in alphas.items()}}


def _product(kind: str, ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    by_path = {k.rpartition(".")[0]: r for k, r in ranks.items()}
    return {
        "peft_type": kind,
        "r": next(iter(by_path.values())),
        "alpha": 1,
        "rank_pattern": {f"^{path}": r for path, r in by_path.items()},
        "alpha_pattern": {f"^{path}": alphas.get(path, r) for path, r in by_path.items()},
    }


def _kronecker(tensors: Tensors, alphas: dict[str, float]) -> dict[str, Any]:
    """LyCORIS scales by alpha/r where a factor has a rank, and by 1 where both matrices are whole."""
    ranks: dict[str, int] = {}
    for key, t in tensors.items():
        path, _, part = key.rpartition(".")
        if part in ("lokr_w1_b", "lokr_w2_b"):
            ranks[f"{path}.lokr"] = t.shape[0]
    for path in {key.rpartition(".")[0] for key in tensors}:
        if f"{path}.lokr" not in ranks:
            ranks[f"{path}.lokr"], alphas[path] = 1, 1.0
    return _product("LOKR", ranks, alphas) | {"decompose_factor": -1}


def _check_magnitudes(tensors: Tensors) -> None:
    for key, t in tensors.items():
        path = key.rpartition(".")[0]
        B = tensors.get(f"{path}.lora_B.weight")
        if key.endswith("lora_magnitude_vector") and B is not None and t.numel() != B.shape[0]:
            raise FileError(f"{key} has {t.numel()} lengths for {B.shape[0]} outputs: DoRA of the inputs is not read.")


def as_lora(tensors: Tensors) -> dict[str, Any]:
    """The config of a LoRA of scale 1 whose ranks are those of the tensors, which have PEFT's names."""
    ends = (".lora_A.weight", ".lora_embedding_A")
    ranks = {
        k.removeprefix(PREFIX).removesuffix(end): t.shape[0]
        for k, t in tensors.items()
        for end in ends
        if k.endswith(end) and t.dim() >= 2
    }
    if not ranks:
        raise FileError(f"no lora_A among the tensors: {listing(tensors)}.")
    r = Counter(ranks.values()).most_common(1)[0][0]
    other = {f"^{path}": n for path, n in ranks.items() if n != r}
    return {"peft_type": "LORA", "r": r, "lora_alpha": r, "rank_pattern": other, "alpha_pattern": dict(other)}


def _mlx(path: Path, paths: set[str]) -> tuple[dict[str, Any], Tensors]:
    """MLX-LM: transposed factors, one scale for all."""
    beside = path.with_name("adapter_config.json")
    if not beside.is_file():
        raise FileError(f"it is MLX-LM's, whose scale stands in {beside.name} beside it, which is missing.")
    said = parsed(beside.read_bytes()[:MAX_CONFIG], str(beside))
    options = said.get("lora_parameters") if isinstance(said, dict) else None
    scale = options.get("scale") if isinstance(options, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise FileError(f"{beside.name}: lora_parameters.scale must be a number, got {shown(scale)}.")
    dora = said.get("fine_tune_type") == "dora"
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"} | ({"m": "lora_magnitude_vector"} if dora else {})
    found: Tensors = {}
    for key, t in read_tensors(path).items():
        place, _, part = key.rpartition(".")
        if part not in names:
            raise FileError(f"tensor {shown(key)} is no part of a LoRA.")
        found[f"{_inside(place, paths)}.{names[part]}"] = t if part == "m" else t.mT.contiguous()
    config = as_lora(found)
    return config | {"lora_alpha": scale * config["r"], "use_dora": dora} | {
        "alpha_pattern": {k: scale * r for k, r in config["alpha_pattern"].items()}
    }, found


def _inside(place: str, paths: Iterable[str]) -> str:
    if place not in paths:
        raise FileError(f"the model has no module {shown(place)}.{did_you_mean(place, paths)}")
    return place


def numbered(path: str) -> tuple[int, str] | None:
    """(number of the block, path inside of it) of a module in a list of blocks."""
    found = re.search(r"(?:^|\.)(?:layers|blocks|h|block)\.(\d+)\.(.+)$", path)
    return None if found is None else (int(found[1]), found[2])
