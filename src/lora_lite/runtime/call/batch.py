"""A batch through a model, whatever form it has, and a model in evaluation for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def call_batch(model: nn.Module, batch: Any) -> Any:
    """The model's output for a dict (or anything with keys), a tuple, a list or a tensor."""
    if hasattr(batch, "keys"):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def values_of(output: Any) -> Iterable[Any]:
    """What a model returns, one by one: of a tuple, a list or a dict (transformers' outputs are dicts), or the one."""
    if isinstance(output, dict):
        return output.values()
    return output if isinstance(output, (tuple, list)) else (output,)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and every module's own mode back afterwards."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode
