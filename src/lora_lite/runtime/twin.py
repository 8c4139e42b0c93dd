"""A frozen copy of an adapter beside it: what a reference model is to a trained one, for the bytes of an adapter."""

from __future__ import annotations

import dataclasses

from torch import nn

from .commit import change, check_attachable, put_in_order, put_on
from .handle import Adapter
from .model.record import Record
from .model.site import owned_tensors
from .model.state import not_merged, record_of, state_of, unwrap
from .model.surroundings import own_surroundings
from .model.undo import Undo
from .start.staging import filled


@own_surroundings()
def frozen_copy(model: nn.Module, name: str, new: str) -> Adapter:
    """Attach a copy of an adapter as it is now, frozen, inactive, and directly behind it in the order.

    Args:
        name: the adapter.
        new: the copy's name.

    Raises:
        StateError: an unknown or a taken name, or a merged or sharded model; it is untouched then.
    """
    check_attachable(model, new)
    model = unwrap(model)
    record, state = record_of(model, name), state_of(model)
    not_merged(state, "copying an adapter")
    targets = {path: dataclasses.replace(t, specs=dict(t.specs)) for path, t in record.targets.items()}
    copy = Record(new, record.variant, record.cfg, targets, steps=record.steps, total_steps=record.total_steps)
    values = {target.key(short): tensor.detach() for target, short, _, tensor in owned_tensors(model, record)}
    active = state.active
    order = [n for old in state.records for n in ((old, new) if old == name else (old,))]
    staged = filled(model, copy, values.items())

    def steps(undo: Undo) -> Adapter:
        handle = put_on(model, copy, staged, False, undo)
        put_in_order(model, order, undo)
        state.select(active)
        return handle

    return change(model, "copying an adapter", steps)
