"""The contract, check by check. Each takes a `Case` and raises AssertionError with a sentence; the number is the
promise it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...io.native import adapter_state_dict
from ...runtime.select import active
from ..case import Case, run

Check = Callable[[Case], None]
CHECKS: dict[str, Check] = {}
"""Name -> check, in the order in which they are written."""
PROMISES: dict[str, str] = {}
"""Name of a check -> the promise that it belongs to."""
_ON: dict[str, Callable[[Case], bool]] = {}


def check(promise: str, on: Callable[[Case], bool] = lambda case: True) -> Callable[[Check], Check]:
    """Enter a check into the suite; it runs for the cases that `on` accepts."""

    def enter(function: Check) -> Check:
        CHECKS[function.__name__] = function
        PROMISES[function.__name__] = promise
        _ON[function.__name__] = on
        return function

    return enter


def applies(name: str, case: Case) -> bool:
    """Whether a check has anything to say about this case."""
    return _ON[name](case)


def affine(case: Case) -> bool:
    return case.affine


def full_precision(case: Case) -> bool:
    return case.dtype == torch.float32


def trains(case: Case) -> bool:
    return case.variant.trains


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest entry of b."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def effect(case: Case, model: nn.Module, x: Tensor) -> float:
    """How much the active adapters change the output, relative to it; the checks mean something only when this is
    large."""
    new = run(model, x)
    with active(model, None):
        return relative(new, run(model, x))


class Planted(RuntimeError):
    """The failure that the checks plant."""


def tensors_of(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    return adapter_state_dict(model, name)


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from ...io.native import read

    return read(path)


def write_file(path: Path, head: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    import json

    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in tensors.items()}, str(path), {"lora_lite": json.dumps(head)})
    return path
