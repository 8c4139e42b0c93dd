"""A server inside a training run (vLLM in GRPO and RLOO), which is sent the merged weights under the base's names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

import lora_lite as ll

from ..runtime.model.site import base_parameters
from .homes import homes

SENDERS = ("sync_weights", "_move_model_to_vllm")
"""How TRL calls what sends the weights, a method of the trainer or of what it generates with."""


def merged_for_servers(trainer: Any, model: nn.Module) -> None:
    """Make whatever of a trainer sends weights to a server send merged ones."""
    for owner in (trainer, *vars(trainer).values()):
        for name in SENDERS:
            if not isinstance(owner, nn.Module) and callable(getattr(owner, name, None)):
                setattr(owner, name, base_names_only(getattr(owner, name), model))


def base_names_only(sync: Callable[..., Any], model: nn.Module) -> Callable[..., Any]:
    """`sync`, which sends a model's `named_parameters`, made to send merged weights and no adapter tensors."""

    @functools.wraps(sync)
    def merged_sync(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for home in homes(model):
                stack.enter_context(_merged(home))
            stack.enter_context(_base_alone(model))
            return sync(*args, **kwargs)

    return merged_sync


@contextmanager
def _merged(home: nn.Module) -> Iterator[None]:
    """The active adapters in the weights, and the base's bits back afterwards."""
    ll.merge(home)
    try:
        yield
    finally:
        ll.unmerge(home)


@contextmanager
def _base_alone(model: nn.Module) -> Iterator[None]:
    """`model.named_parameters()` without what belongs to adapters; tied weights once, as torch gives them."""

    def named_parameters(*_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        seen: set[int] = set()
        for name, p in base_parameters(model):
            if id(p) not in seen:
                seen.add(id(p))
                yield name, p

    model.__dict__["named_parameters"] = named_parameters
    try:
        yield
    finally:
        del model.__dict__["named_parameters"]
