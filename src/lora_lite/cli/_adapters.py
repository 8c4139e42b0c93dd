"""Adapters as the commands take them: paths, short names, weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lora_lite as ll

from . import _folder as folder

BaseCheck = Literal["error", "warn", "ignore"]


def check_paths(paths: Sequence[Path]) -> None:
    """Refuse a path that is not there.

    Raises:
        FileError: there is no such file or folder.
    """
    for path in paths:
        if not path.exists():
            raise ll.FileError(f"{path}: there is no such file or folder.")


def names_of(paths: Sequence[Path]) -> dict[str, Path]:
    """A short name for every adapter: its folder's or file's, made unique."""
    found: dict[str, Path] = {}
    for path in paths:
        name = path.parent.name if path.name == folder.ADAPTER else path.stem
        name = "".join(c if c.isalnum() or c in "_-" else "_" for c in name) or "adapter"
        while name in found:
            name += "_"
        found[name] = path
    return found


def weights_of(paths: Sequence[Path], given: Sequence[float]) -> list[float]:
    """One weight for every adapter, 1 where none is given.

    Raises:
        ConfigError: another number of weights.
    """
    if given and len(given) != len(paths):
        raise ll.ConfigError(f"--weights: {len(given)} are given for {len(paths)} adapters; give one for each.")
    return list(given) or [1.0] * len(paths)


def load_all(model: Any, names: dict[str, Path], base_check: BaseCheck) -> None:
    """Load adapters under their short names."""
    for name, path in names.items():
        ll.load(model, folder.adapter_path(path), name=name, base_check=base_check)
