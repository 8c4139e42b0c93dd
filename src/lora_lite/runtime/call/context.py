"""What `ll.context` says of each row, as the running call has it."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...core.errors import SelectionError
from ..model.call import Call
from ..model.state import ModelState
from .batch import batch_first


def with_context(
    state: ModelState, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], call: Call | None
) -> Call | None:
    """The call with the context of its rows, repeated where the batch is k times as long (beam search).

    Raises:
        SelectionError: the batch does not fit.
    """
    context = state.said_here().context
    if not context:
        return call
    first = batch_first(model, args, kwargs)
    if first is None:
        raise SelectionError("ll.context speaks of the rows of a batch, and the call brings no tensor with a batch.")
    call = call or Call((first.shape[0], first.shape[1] if first.dim() > 1 else 1), {})
    for name, value in context.items():
        if len(first) % len(value):
            raise SelectionError(f"ll.context names {name} of {len(value)} rows, and the batch has {len(first)}.")
        call.context[name] = value.to(first.device).repeat_interleave(len(first) // len(value), 0)
    return call
