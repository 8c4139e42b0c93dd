"""A batch through a model, whatever form it has, and a model in evaluation for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...core.errors import ConfigError, shown
from ..model.call import Extent
from ..model.undo import surely

TOKENS = ("input_ids", "inputs_embeds")
"""What transformers calls a sequence of tokens."""


def call_batch(model: nn.Module, batch: Any) -> Any:
    """The model's output for a dict (or anything with keys), a tuple, a list or a tensor.

    Raises:
        ConfigError: it is none of these, or nothing in it is more than a word or a number.
    """
    if all(part is None or isinstance(part, (str, int, float, nn.Module)) for part in _parts(batch)):
        raise ConfigError(
            "a batch is a tensor, or a tuple or dict of tensors as the model takes them: model(*batch), "
            f"model(**batch); got {shown(batch)}."
        )
    if hasattr(batch, "keys"):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _parts(batch: Any) -> Iterable[Any]:
    if isinstance(batch, Mapping):
        return batch.values()
    return batch if isinstance(batch, (tuple, list)) else (batch,)


def values_of(output: Any) -> Iterable[Any]:
    """What a model returns, one by one: of a tuple, a list or a dict (transformers' outputs are dicts), or the one."""
    if isinstance(output, dict):
        return output.values()
    return output if isinstance(output, (tuple, list)) else (output,)


def batch_first(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor of a call whose first dimension is the batch: the input as transformers names it, else the first with
    two dimensions or more. `cache_position` (tokens,) may stand before them all, and has no batch."""
    for name in (getattr(model, "main_input_name", ""), *TOKENS):
        if isinstance(kwargs.get(name), Tensor):
            return kwargs[name]
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 0]
    for value in tensors:
        if value.dim() > 1:
            return value
    return tensors[0] if tensors else None


def extent_of(
    model: nn.Module, parameters: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Extent | None:
    """The batch of a call, whose forward has these parameters."""
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    rest = args[len(parameters) :]
    first = batch_first(model, rest, given)
    if first is None or not first.dim():
        return None
    has_tokens = first.dim() == 3 or (first.dim() == 2 and not first.is_floating_point())
    sizes = [value.shape[0] for value in (*rest, *given.values()) if isinstance(value, Tensor) and value.dim() > 1]
    others = [size for size in sizes if size not in (1, first.shape[0])]
    named = any(first is given.get(name) for name in (getattr(model, "main_input_name", ""), *TOKENS))
    return Extent(first.shape[0], first.shape[1] if has_tokens else None, tuple(others), named)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and every module's own mode back afterwards."""
    modes = {m: m.training for m in model.modules()}

    def restore() -> None:
        for m, mode in modes.items():
            m.training = mode

    with surely(restore):
        model.eval()
        yield
