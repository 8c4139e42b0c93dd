"""Reading files that somebody else may have written: the one place where JSON and safetensors of adapters are opened.
Whatever such a file does wrong is one class of error, `FileError`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import FileError, LoraLiteError, listing

DIGITS = 20
"""Of a whole number in such JSON; 2⁶⁴ has twenty."""
WORDS = 2000
"""Characters of what a file may say of itself in a message."""
MAPPED = 8 << 20
"""Bytes of a file that are looked at before it is opened anew."""
SUMMED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that torch sums, of which float32 can hold every number."""
WRONG = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, OSError, MemoryError)
"""What code raises that takes a value for what it should be. `RuntimeError` is torch's, and that of a nesting that is
too deep."""


def check_path(path: object) -> None:
    """Refuse what is no path: every public entry that takes one comes through here.

    Raises:
        FileError: it is none.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise FileError(f"a path is needed, a str or pathlib.Path; got {path!r} of {type(path).__name__}.")


@contextmanager
def reading(where: str | os.PathLike[str], what: str = "") -> Generator[None, None, None]:
    """Inside, whatever goes wrong with what a file says is a `FileError` that names the file, and in it `what`."""
    name = os.fspath(where)
    try:
        yield
    except FileError as e:
        said = str(e)
        if name in said and len(said) <= WORDS:
            raise
        raise type(e)(said[:WORDS] if name in said else f"{name}: {said[:WORDS]}") from None
    except LoraLiteError as e:
        raise FileError(f"{name}: {str(e)[:WORDS]}") from None
    except SafetensorError as e:
        raise FileError(
            f"{name} cannot be read: damaged, or no safetensors file ({str(e)[:WORDS]}). "
            "lora_lite reads no pickles: .bin, .pt and .pkl are refused."
        ) from None
    except FileNotFoundError:
        raise FileError(f"{name} does not exist.") from None
    except WRONG as e:
        raise FileError(f"{name}: {what or 'it'} is malformed ({repr(e)[:WORDS]}).") from None


@contextmanager
def opened(path: str | os.PathLike[str]) -> Generator[Any, None, None]:
    """safetensors' handle of a file: `keys()`, `get_tensor(key)`, `metadata()`.

    Raises:
        FileError: it is not there, or damaged; also where a tensor cannot be read inside the block.
    """
    with reading(path), cast("Any", safe_open(os.fspath(path), "pt")) as f:
        yield f


def each_tensor(path: str | os.PathLike[str], keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of a file, one after the other; who keeps a tensor copies it.

    Each lies in a mapping of the file, of which every page that was looked at counts as memory of the process until the
    file is closed. So it is opened anew every `MAPPED` bytes, and reading costs little more than what is kept.

    Raises:
        FileError: as `opened`.
    """
    rest = list(keys)[::-1]
    while rest:
        with opened(path) as f:
            seen = 0
            while rest and seen < MAPPED:
                key = rest.pop()
                t: Tensor = f.get_tensor(key)
                seen += t.nbytes
                yield key, t


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a file, in memory of their own.

    Raises:
        FileError: as `opened`, or a value is complex or not finite.
    """
    with opened(path) as f:
        keys: list[str] = list(f.keys())
    tensors = {key: t.clone() for key, t in each_tensor(path, keys)}
    strange = [k for k, t in tensors.items() if t.is_complex()]
    bad = [k for k, t in tensors.items() if t.is_floating_point() and not is_finite(t)]
    if strange:
        raise FileError(f"{os.fspath(path)} holds complex numbers, which no adapter has: {listing(strange)}.")
    if bad:
        raise FileError(f"{os.fspath(path)} holds values that are not finite: {listing(bad)}.")
    return tensors


def is_finite(t: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor what float32 cannot hold, found without a second tensor of its
    size."""
    if t.dtype in SUMMED and math.isfinite(float(t.sum())):  # which no infinity and no NaN leaves finite
        return True
    low, high = torch.aminmax(t if t.element_size() > 1 else t.float()) if t.numel() else (t.new_zeros(()),) * 2
    return bool(low.float().isfinite() and high.float().isfinite())


def parsed(text: str | bytes, where: str) -> Any:
    """Plain JSON, of a size that does no harm.

    Raises:
        FileError: it is no JSON, names a key twice, is nested deeper than Python goes, or holds a whole number of more
            than `DIGITS` digits.
    """
    try:
        return json.loads(text, parse_int=_whole, object_pairs_hook=_mapping)
    except (ValueError, RecursionError) as e:
        raise FileError(f"{where} is not JSON ({str(e)[:WORDS]}).") from None


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found
