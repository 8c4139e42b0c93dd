"""`ll.merge_and_unload`: a plain model with the adapters in its weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from .commit import take_off
from .merge import merge, unmerge
from .model.state import state_of, unwrap
from .model.undo import all_or_nothing, restoring


def merge_and_unload(
    model: nn.Module, name: str | None = None, dequantize: bool = False, check: Any = None
) -> nn.Module:
    """Fold adapters into the weights for good and forget all adapters: no hook, no `lora_*` key, ready for
    `save_pretrained` or the next adapter. Returns the model.

    Args:
        name: one adapter; None means the active set, or what is merged already. Adapters that are not merged go too.
        dequantize: replace quantised target layers by dense ones. Without it they raise.
        check: a batch; the outputs before and after are compared, and `ll.merge` says by how much they differ.

    Raises:
        StateError: nothing to merge, or a method is not affine in x.
        WeightError: a quantised, tied, offloaded or sharded weight. The model is as before.
    """
    bare = unwrap(model)
    was_merged = state_of(bare).merged is not None
    merge(bare, name, dequantize, check)
    state = state_of(bare)
    try:
        with all_or_nothing() as undo:
            undo(restoring(state))
            state.merged = None
            take_off(bare, list(state.records), undo)
    except BaseException:
        if not was_merged:
            unmerge(bare)
        raise
    return model
