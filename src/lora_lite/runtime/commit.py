"""Put an adapter's tensors and hooks onto the model, and take them off again: commit, detach, rename."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from .._torch import forget_compiled
from ..core.errors import StateError
from .call.experts import experts_post_hook, experts_pre_hook
from .call.hooks import post_hook, pre_hook
from .call.root import root_post_hook, root_pre_hook
from .call.vocabulary import vocabulary_of
from .handle import Adapter
from .layers.bank import Bank
from .layers.kinds import is_sharded
from .layers.norm import read_norm
from .layers.read import fingerprint
from .model.record import Record
from .model.site import Site, Slot, stored_name
from .model.state import SITE, STATE, outside_scope, record_of, state_of, unwrap
from .start.staging import StagedTarget
from .state_dicts import after_state_dict, before_load_state_dict

HOOKS: dict[str, Callable[..., Any]] = {"_forward_pre_hooks": pre_hook, "_forward_hooks": post_hook}


EXPERT_HOOKS: dict[str, Callable[..., Any]] = {
    "_forward_pre_hooks": experts_pre_hook,
    "_forward_hooks": experts_post_hook,
}


ROOT_HOOKS: dict[str, Callable[..., Any]] = {
    "_forward_pre_hooks": root_pre_hook,
    "_forward_hooks": root_post_hook,
    "_load_state_dict_pre_hooks": before_load_state_dict,
    "_state_dict_hooks": after_state_dict,
}


def check_attachable(model: nn.Module, name: str) -> None:
    """Raise when an adapter cannot be added to this model under this name."""
    if not name or not all(c.isalnum() or c in "_-" for c in name):
        raise StateError(f"an adapter's name consists of letters, digits, '_' and '-'; got {name!r}.")
    wrapper = type(model).__name__
    sharded = [n for n, p in model.named_parameters() if is_sharded(p)]
    if (
        wrapper in ("DistributedDataParallel", "FullyShardedDataParallel")
        or sharded
        or any(type(m).__name__.startswith("FSDP") for m in model.modules())
    ):
        raise StateError(
            f"the model is already {'wrapped in ' + wrapper if not sharded else 'sharded (' + sharded[0] + ')'}; "
            "adapters added now would not be synchronised between ranks. Attach first, then call fully_shard / "
            "DistributedDataParallel / deepspeed.initialize."
        )
    model = unwrap(model)
    state = model.__dict__.get(STATE)
    for path, module in model.named_modules():
        if SITE in module.__dict__ and module.__dict__[SITE].state is not state:
            root = next((p for p, m in model.named_modules() if m is not model and STATE in m.__dict__), None)
            raise StateError(
                f"{path or 'the layer'!r} belongs to an adapter of "
                f"{'a larger model' if root is None else repr(root)}, which chooses its adapters on its own. Attach "
                "to the whole model (target_names says where), or ll.detach the other adapter first."
            )
    if state is None:
        return
    outside_scope(state, "adding or renaming an adapter")
    if state.merged is not None:
        raise StateError("the model is merged; call ll.unmerge(model) before attaching or loading.")
    if name in state.records:
        raise StateError(
            f"an adapter called {name!r} is attached already. Give the new one another name (name='second'), go on "
            f"training the present one (ll.adapters(model)[{name!r}].trainable = True), or ll.detach(model, {name!r}) "
            "first."
        )


def commit(model: nn.Module, record: Record, staged: list[StagedTarget], trainable: bool) -> Adapter:
    """Register staged tensors and hooks. Everything that can be checked is checked before the first change."""
    state = state_of(model, create=True)
    record.trainable = trainable
    record.targets = {view.target.path: view.target for view in staged}
    for view in staged:
        # a start drawn by a lambda has done its work, and the model must stay picklable
        view.target.specs = {
            k: dataclasses.replace(s, init="empty") if callable(s.init) else s for k, s in view.target.specs.items()
        }
        view.target.base = fingerprint(view.module) if view.target.kind != "block" else {}
        for short in view.tensors:
            attribute = stored_name(short, record.name)
            if hasattr(view.module, attribute):
                raise StateError(
                    f"{view.target.path} has an attribute {attribute!r} of its own; choose another adapter name."
                )
    owners = {view.target.path: view.module for view in staged}
    norms = {
        view.target.path: read_norm(view.module, view.target.path)
        for view in staged
        if view.target.kind == "norm" and view.device.type != "meta"
    }
    frozen = _base_trainable(model)

    for n in frozen:
        model.get_parameter(n).requires_grad_(False)
    state.base_trainable = list(dict.fromkeys((*state.base_trainable, *frozen)))
    for view in staged:
        layer, target = view.module, view.target
        for short, spec in target.specs.items():
            attribute = stored_name(short, record.name)
            if spec.as_buffer:
                layer.register_buffer(attribute, view.tensors[short])
            else:
                grad = trainable and spec.is_trained
                layer.register_parameter(attribute, nn.Parameter(view.tensors[short], requires_grad=grad))
        site = layer.__dict__.get(SITE)
        if site is None:
            site = layer.__dict__[SITE] = Site(target.path, target.kind, state)
            if isinstance(layer, Bank):
                _join(layer, target.path.rpartition(".")[2])
            else:
                layer.register_forward_pre_hook(pre_hook, with_kwargs=True)
                layer.register_forward_hook(post_hook, with_kwargs=True)
        site.norm = norms.get(target.path)
        site.slots[record.name] = Slot(record, target, {short: owners[path] for short, path in target.shared.items()})
        site.has_input = any(s.forward_input is not None for s in site.slots.values())
    if STATE not in model.__dict__:
        model.__dict__[STATE] = state
        model.register_forward_pre_hook(root_pre_hook, with_kwargs=True)
        model.register_forward_hook(root_post_hook, with_kwargs=True)
        model.register_load_state_dict_pre_hook(before_load_state_dict)
        model.register_state_dict_post_hook(after_state_dict)
    state.vocabulary |= vocabulary_of(model, owners)
    state.records[record.name] = record
    state.active = ((record.name, 1.0),)
    state.row_epoch += 1
    forget_compiled()
    return Adapter(model, record.name)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Remove one adapter, or all of them (`name=None`). With the last one go the hooks, and the base's `requires_grad`
    comes back.

    Raises:
        StateError: unknown name, merged model, or a model that was sharded after attaching (the sharding owns the
            tensors).
    """
    model = unwrap(model)
    state = state_of(model)
    if state.merged is not None:
        raise StateError("the model is merged; call ll.unmerge(model) before ll.detach(model).")
    outside_scope(state, "ll.detach")
    if any(is_sharded(p) for p in model.parameters()):
        raise StateError(
            "the model is sharded, and the sharding owns the adapter's tensors. Save the adapter, and load it into a "
            "fresh model instead."
        )
    names = list(state.records) if name is None else [record_of(model, name).name]
    modules = dict(model.named_modules())
    for record in (state.records.pop(n) for n in names):
        for target in record.targets.values():
            layer = modules.get(target.path)
            site = layer.__dict__.get(SITE) if layer is not None else None
            if layer is None or site is None:  # something replaced the layer
                continue
            for short in target.specs:
                attribute = stored_name(short, record.name)
                layer._parameters.pop(attribute, None)
                layer._buffers.pop(attribute, None)
            del site.slots[record.name]
            site.has_input = any(s.forward_input is not None for s in site.slots.values())
            if not site.slots:
                del layer.__dict__[SITE]
                _remove_hooks(layer, HOOKS)
                if isinstance(layer, Bank):
                    _leave(layer, target.path.rpartition(".")[2])
    state.active = tuple((n, w) for n, w in state.active if n in state.records)
    state.row_epoch += 1
    if not state.records:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for n in state.base_trainable:
            if n in parameters:
                parameters[n].requires_grad_(True)
        del model.__dict__[STATE]
        _remove_hooks(model, ROOT_HOOKS)
    forget_compiled()


def _join(bank: Bank, name: str) -> None:
    """Make a bank a child of the experts' module, whose hooks swap the adapted weights in."""
    owner: nn.Module = bank.__dict__["owner"]
    if not any(isinstance(m, Bank) for m in owner._modules.values()):
        owner.register_forward_pre_hook(experts_pre_hook, with_kwargs=True)
        owner.register_forward_hook(experts_post_hook, with_kwargs=True, always_call=True)
    owner.add_module(name, bank)


def _leave(bank: Bank, name: str) -> None:
    owner: nn.Module = bank.__dict__["owner"]
    del owner._modules[name]
    if not any(isinstance(m, Bank) for m in owner._modules.values()):
        _remove_hooks(owner, EXPERT_HOOKS)


def rename(model: nn.Module, old: str, new: str) -> None:
    """Give an adapter another name; its tensors stay the same objects, so optimisers keep working."""
    model = unwrap(model)
    record, state = record_of(model, old), state_of(model)
    check_attachable(model, new)
    for target in record.targets.values():
        layer = model.get_submodule(target.path)
        for short in target.specs:
            tables: list[dict[str, Any]] = [layer._parameters, layer._buffers]  # pyright: ignore[reportAssignmentType]
            for table in tables:
                if stored_name(short, old) in table:
                    table[stored_name(short, new)] = table.pop(stored_name(short, old))
    record.name = new
    state.row_epoch += 1
    for path, target in record.targets.items():
        site = model.get_submodule(path).__dict__[SITE]
        owners = site.slots[old].owners
        site.slots = {
            (new if n == old else n): (Slot(record, target, owners) if n == old else s) for n, s in site.slots.items()
        }
    state.records = {(new if n == old else n): r for n, r in state.records.items()}
    state.active = tuple((new if n == old else n, w) for n, w in state.active)
    forget_compiled()


def _base_trainable(model: nn.Module) -> list[str]:
    """Paths of the parameters that require a gradient and belong to no adapter."""
    found = []
    for path, module in model.named_modules():
        site: Site | None = module.__dict__.get(SITE)
        adapters = {a for slot in site.slots.values() for a in slot.keys.values()} if site is not None else ()
        for attribute, p in module._parameters.items():
            if p is not None and p.requires_grad and attribute not in adapters:
                found.append(f"{path}.{attribute}" if path else attribute)
    return found


def _remove_hooks(module: nn.Module, hooks: dict[str, Callable[..., Any]]) -> None:
    for table_name, function in hooks.items():
        table = getattr(module, table_name)
        for key in [k for k, h in table.items() if getattr(h, "hook", h) is function]:  # torch wraps some
            del table[key]
            for extra in ("_with_kwargs", "_always_called"):
                getattr(module, table_name + extra, {}).pop(key, None)
