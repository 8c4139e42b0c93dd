"""An adapter with fewer tensors and the same function: what remains of a rank schedule, or the head of a nested one."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from ..core.arguments import checked
from ..core.errors import StateError
from .commit import change, check_free, give_name, put_in_order, put_on, take_off
from .handle import Adapter
from .model.record import Record, Target
from .model.site import Slot, owned_tensors
from .model.state import record_of, state_of, unwrap
from .model.surroundings import own_surroundings
from .model.undo import Undo
from .start.staging import filled
from .targets.choose import check_owners, make_target
from .view.layer import StagedView


def compacted(
    model: nn.Module, record: Record, tensors: dict[str, Tensor], rank: int | None = None
) -> tuple[Record, dict[str, Tensor]]:
    """The record and the tensors (full path -> tensor) of the smaller adapter; the model is only looked at."""
    if record.variant.compact is None:
        raise StateError(f"adapter {record.name!r}: variant {record.variant.name!r} has nothing to compact.")
    targets: dict[str, Target] = {}
    small: dict[str, Tensor] = {}
    for path, target in record.targets.items():
        if target.cfg.variant != record.cfg.variant:  # trained whole beside the method
            targets[path] = target
            small |= {target.key(short): tensors[target.key(short)] for short in target.specs}
            continue
        if target.experts:
            raise StateError(f"{path}: adapters on fused experts cannot be compacted; keep the adapter as it is.")
        seen = {short: tensors[target.key(short)] for short in target.specs}
        seen |= {short: tensors[record.targets[owner].key(short)] for short, owner in target.shared.items()}
        view = StagedView(unwrap(model).get_submodule(path), Slot(record, target, {}), seen)
        with own_surroundings():
            result = record.variant.compact(view, rank)
        if result is None:
            continue
        changes, new = result
        cfg = dataclasses.replace(target.cfg, **changes)
        less = make_target(path, target.d_in, target.d_out, cfg, target.kind)
        shared = {short: spec for short, spec in target.specs.items() if short in target.shared}
        small |= {target.key(short): seen[short] for short in shared}
        targets[path] = dataclasses.replace(target, cfg=cfg, specs=less.specs | shared)
        for short, spec in less.specs.items():
            if tuple(new[short].shape) != spec.shape:
                raise StateError(
                    f"{path}.{short}: compact made {tuple(new[short].shape)}, its config says {spec.shape}."
                )
            small[target.key(short)] = new[short].contiguous()
    if not targets:
        raise StateError(f"adapter {record.name!r}: nothing is left of it after compacting.")
    check_owners(targets)
    return dataclasses.replace(record, targets=targets, scheduled=False, train_calls=0), small


@checked
def compact(model: nn.Module, name: str | None = None, rank: int | None = None) -> Adapter:
    """Replace an adapter by a smaller one: the live triplets of a finished rank schedule, or the first `rank` ranks of
    a nested method.

    Its parameters are new ones, so build the optimiser anew to go on training.

    Raises:
        StateError: the method cannot be compacted (yet), or the model is merged or sharded. The model is as before.
    """
    model = unwrap(model)
    old, state = record_of(model, name), state_of(model)
    if rank is None and not 0 < old.total_steps <= old.steps:
        raise StateError(
            f"adapter {old.name!r}: its schedule has not ended (step {old.steps} of "
            f"{old.total_steps or 'an unknown number'}); train on, or pass rank=... if the method has nested ranks."
        )
    check_free(model, state, "ll.compact")
    tensors = {t.key(short): tensor.detach() for t, short, _, tensor in owned_tensors(model, old)}
    record, small = compacted(model, old, tensors, rank)
    record.name = f"{old.name}~"  # which no user can give, until the old one has left
    staged = filled(model, record, small.items())
    order, active = list(state.records), state.active

    def steps(undo: Undo) -> Adapter:
        with own_surroundings():
            put_on(model, record, staged, old.trainable, undo)
        take_off(model, [old.name], undo)
        give_name(model, record, old.name, undo)
        put_in_order(model, order, undo)
        state.select(active)
        return Adapter(model, old.name)

    return change(model, "ll.compact", steps)
