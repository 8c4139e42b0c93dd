"""`ll.load`: an adapter from a file of ours or from a folder in another library's layout."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from ..core.errors import FileError
from ..runtime.commit import check_attachable
from ..runtime.handle import Adapter
from ..runtime.model.state import DEFAULT, unwrap
from .native import BaseCheck, load_native
from .peft import load_peft


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = DEFAULT,
    trainable: bool = False,
    base_check: BaseCheck = "error",
) -> Adapter:
    """Attach an adapter from a file and make it the active one. Needs neither an SVD nor calibration data.

    Args:
        path: a file written by `save`, a folder that a trainer left, or one in PEFT's layout. Of a folder with several
            of our files the one of the adapter called `name` is read.
        name: the adapter's name in this model.
        trainable: go on training it.
        base_check: what to do when the base weights are not those the adapter was trained on.

    Raises:
        FileError: damaged, of another format, or with missing, unexpected or ill-shaped tensors.
        BaseMismatchError: other base weights.
        StateError: the name is taken or the model is merged. In each case the model is untouched.
    """
    if base_check not in ("error", "warn", "ignore"):
        raise FileError(f"base_check must be 'error', 'warn' or 'ignore', got {base_check!r}.")
    check_attachable(model, name)
    if os.path.isdir(path):
        own = _own_file(Path(path), name)
        if own is None:
            return load_peft(unwrap(model), path, name, trainable)
        path = own
    return load_native(unwrap(model), path, name, trainable, base_check)


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
