"""Safetensors files: written beside their place, read back, renamed. And the checksums of what they hold."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.errors import FileError
from .places import replaced


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file whole or not at all: beside its place, read back, compared, renamed.

    Raises:
        FileError: it cannot be written, or does not read back; an old file is still there.
    """
    with replaced(path) as temp:
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


def checksum(t: Tensor) -> int:
    """CRC-32 of a tensor's bytes, which no single flipped bit leaves as it was."""
    data: Any = t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return zlib.crc32(data)
