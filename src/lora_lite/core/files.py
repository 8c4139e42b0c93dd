"""Reading a safetensors file: the one place where such a file is opened."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import FileError, listing


@contextmanager
def opened(path: str | os.PathLike[str]) -> Generator[Any, None, None]:
    """safetensors' handle of a file: `keys()`, `get_tensor(key)`, `metadata()`.

    Raises:
        FileError: it is not there, or damaged; also where a tensor cannot be read inside the block.
    """
    try:
        with cast("Any", safe_open(os.fspath(path), "pt")) as f:
            yield f
    except FileNotFoundError:
        raise FileError(f"{os.fspath(path)} does not exist.") from None
    except SafetensorError as e:
        raise FileError(
            f"{os.fspath(path)} cannot be read: damaged, or no safetensors file ({e}). "
            "lora_lite reads no pickles: .bin, .pt and .pkl are refused."
        ) from None


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        FileError: as `opened`, or a value is not finite.
    """
    with opened(path) as f:
        tensors: dict[str, Tensor] = {key: f.get_tensor(key) for key in f.keys()}
    bad = [k for k, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t.float()).all())]
    if bad:
        raise FileError(f"{os.fspath(path)} holds values that are not finite: {listing(bad)}.")
    return tensors
