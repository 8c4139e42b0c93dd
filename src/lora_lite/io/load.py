"""`ll.load`: an adapter from a file of ours or from a folder in another library's layout."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.errors import FileError, LoraLiteWarning, shown
from ..core.files import check_path, reading
from ..runtime.commit import check_attachable
from ..runtime.handle import Adapter
from ..runtime.model.state import DEFAULT, unwrap
from ..runtime.targets.structure import home_of, transformer_inside
from .header import read_header
from .native import BaseCheck, check_strictness, load_native
from .other_layouts import MLX_WEIGHTS, as_lora, is_other, load_other
from .peft_read import CONFIG, WEIGHTS, attach_peft, check_owners, load_peft, peft_paths


def load(
    model: nn.Module,
    path: str | os.PathLike[str] | Mapping[str, Tensor],
    name: str = DEFAULT,
    trainable: bool = False,
    base_check: BaseCheck = "error",
    *,
    config: dict[str, Any] | None = None,
) -> Adapter:
    """Attach an adapter from this machine; `ll.load` finds it on the hub too.

    Args:
        path: a file, a folder, or tensors with PEFT's names.
        name: the adapter's name in this model.
        trainable: go on training it.
        base_check: what to do when the base weights are not those the adapter was trained on.
        config: for tensors: the fields of adapter_config.json.

    Raises:
        FileError: damaged, of another format, or with missing, unexpected or ill-shaped tensors.
        BaseMismatchError: other base weights.
        StateError: the name is taken or the model is merged. In each case the model is untouched.
    """
    check_strictness(base_check)
    check_attachable(model, name)
    if isinstance(path, Mapping):
        return _load_tensors(unwrap(model), path, config, name, trainable)
    check_path(path)
    if os.path.isdir(path):
        own = _own_file(Path(path), name)
        if own is None and not (Path(path) / MLX_WEIGHTS).is_file():
            model = _home(model, Path(path), None, name)
        if own is None and (Path(path) / MLX_WEIGHTS).is_file():
            return load_other(unwrap(model), Path(path) / MLX_WEIGHTS, name, trainable)
        if own is None:
            return load_peft(unwrap(model), Path(path), name, trainable)
        path = own
    if os.path.basename(path) == WEIGHTS and (Path(path).parent / CONFIG).is_file():
        return load_peft(unwrap(model), Path(path).parent, name, trainable)
    if is_other(path):
        return load_other(unwrap(model), Path(path), name, trainable)
    return load_native(_home(model, Path(path), Path(path), name), path, name, trainable, base_check)


def _home(model: nn.Module, folder: Path, own: Path | None, name: str) -> nn.Module:
    """The model, or the transformer inside a container (a SentenceTransformer) where the layers of a file of ours or of
    a folder of PEFT's are there."""
    model = unwrap(model)
    if transformer_inside(model)[1] is model:  # no container, and no file is read twice
        return model
    if own is not None:
        paths = list(read_header(own)["targets"])
    else:
        paths = peft_paths(folder)
    home = home_of(model, paths)
    if home is not model:
        check_attachable(home, name)
    return home


def _load_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], config: dict[str, Any] | None, name: str, trainable: bool
) -> Adapter:
    """Tensors with PEFT's names, such as another network makes; copied, so that no gradient reaches their maker."""
    where = "the tensors"
    if not tensors or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in tensors.items()):
        raise FileError(f"{where} must be a mapping of names to tensors, got {shown(type(tensors).__name__)}.")
    if config is None:
        if any(k.rpartition(".")[2].startswith("lora_") and "base_model." not in k for k in tensors) and not any(
            k.endswith(".weight") for k in tensors
        ):
            raise FileError(
                f"{where} have the names of ll.adapter_state_dict: attach the adapter's config, "
                "ll.attach(model, cfg), and fill it with ll.load_adapter_state_dict(model, name, tensors)."
            )
        config = as_lora(dict(tensors))
        warnings.warn(
            f"{where} come without a config and are read as a LoRA of scale 1; pass "
            'config={"peft_type": "LORA", "r": 8, "lora_alpha": 16} to say otherwise.',
            LoraLiteWarning,
            stacklevel=4,
        )
    with reading(where):
        check_owners(list(tensors), model)
    return attach_peft(model, dict(config), {k: t.detach() for k, t in tensors.items()}, name, trainable, where)


def adapter_file(name: str) -> str:
    """The file name of an adapter in a folder."""
    return "adapter.safetensors" if name == DEFAULT else f"adapter-{name}.safetensors"


def _own_file(folder: Path, name: str) -> Path | None:
    """The file of ours that a folder holds for this adapter; None where it holds none of ours."""
    found = sorted([*folder.glob("adapter.safetensors"), *folder.glob("adapter-*.safetensors")])
    if len(found) < 2:
        return found[0] if found else None
    if folder / adapter_file(name) in found:
        return folder / adapter_file(name)
    raise FileError(
        f"{folder} holds {', '.join(path.name for path in found)} and no {adapter_file(name)}; name the adapter "
        "(name=...), or give the file itself."
    )
