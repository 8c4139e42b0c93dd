"""Safetensors files: written beside their place, read back, renamed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.errors import FileError


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file whole or not at all: beside its place, read back, compared, renamed.

    Raises:
        FileError: what was written does not read back; an old file is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(fd)
    try:
        save_file(tensors, temp, metadata)
        with safe_open(temp, "pt") as f:
            if (
                set(f.keys()) != set(tensors)
                or f.metadata() != metadata
                or any(not torch.equal(f.get_tensor(k), t) for k, t in tensors.items())
            ):
                raise FileError(f"{path}: what was written does not read back; is the disk full?")
        with open(temp, "rb") as f:
            os.fsync(f.fileno())
        os.chmod(temp, 0o666 & ~_umask())
        os.replace(temp, path)
    except BaseException:
        Path(temp).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
