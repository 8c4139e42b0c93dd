"""A deep model's costs from two shallow ones: where all blocks are of one build, each further block adds the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..runtime.targets.structure import describe

DEPTHS = (1, 2)
"""Blocks of the two models that are counted."""


def shallow(model: Any) -> list[Any]:
    """Copies of a model with the first block alone and with the first two; none where the blocks are not one stack of
    one build, or are so few that nothing is won."""
    blocks = describe(model).stacked
    if len(blocks) <= sum(DEPTHS) or len({block.n_layers for block in blocks}) != 1:
        return []
    path = blocks[0].path.rpartition(".")[0]
    stack = model.get_submodule(path)
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        return []
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if len(stack) != len(blocks) or len({_build(block.module) for block in blocks}) != 1 or len(kinds) > 1:
        return []
    return [_cut(model, path, n) for n in DEPTHS]


def _build(block: nn.Module) -> tuple[Any, ...]:
    """What two blocks have in common that cost the same."""
    modules = [(name, type(m)) for name, m in block.named_modules()]
    tensors = [*block.named_parameters(), *block.named_buffers()]
    return tuple(modules), tuple((name, t.shape, t.dtype) for name, t in tensors)


def _cut(model: Any, path: str, n: int) -> Any:
    """A copy of a model with the first `n` blocks of the stack under a path."""
    parent, _, name = path.rpartition(".")
    owner, stack = model.get_submodule(parent), model.get_submodule(path)
    setattr(owner, name, stack[:n])
    try:
        small = copy.deepcopy(model)
    finally:
        setattr(owner, name, stack)
    small.config.get_text_config().num_hidden_layers = n
    return small


def along(first: Sequence[int], second: Sequence[int], depth: int) -> tuple[int, ...]:
    """Figures at a depth, from those at both of `DEPTHS`: they lie on a line."""
    few, more = DEPTHS
    return tuple(a + (b - a) * (depth - few) // (more - few) for a, b in zip(first, second, strict=True))
