"""`ll.merge_and_unload`: a plain model with the adapters in its weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.arguments import checked
from .commit import change, take_off
from .merge import merge, unmerge
from .model.state import state_of, unwrap
from .model.undo import Undo, restoring


@checked
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
    state = state_of(bare)
    active = state.active

    def steps(undo: Undo) -> nn.Module:
        undo(lambda: state.select(active))
        undo(lambda: None if was_merged else unmerge(bare))
        merge(bare, name, dequantize, check)
        undo(restoring(state))
        state.merged = None
        take_off(bare, list(state.records), undo)
        return model

    return change(bare, "ll.merge_and_unload", steps)
