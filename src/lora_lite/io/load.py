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
from .peft_read import load_peft


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = DEFAULT,
    trainable: bool = False,
    base_check: BaseCheck = "error",
) -> Adapter:
    """Attach an adapter from a file and make it the active one. Needs neither an SVD nor calibration data.

    Args:
        path: a file written by `save`, or a folder in PEFT's layout.
        name: the adapter's name in this model.
        trainable: go on training it.
        base_check: what to do when the base weights are not those the adapter was trained on.

    Raises:
        FileError: damaged, of another format, or with missing, unexpected or ill-shaped tensors.
        BaseMismatchError: other base weights.
        TargetError: a layer of a file of ours is never called as a module, or has several paths.
        StateError: the name is taken or the model is merged. In each case the model is untouched.
    """
    if base_check not in ("error", "warn", "ignore"):
        raise FileError(f"base_check must be 'error', 'warn' or 'ignore', got {base_check!r}.")
    check_attachable(model, name)
    if Path(path).is_dir():
        return load_peft(unwrap(model), Path(path), name, trainable)
    return load_native(unwrap(model), path, name, trainable, base_check)
