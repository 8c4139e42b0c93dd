"""Put an adapter's tensors and hooks onto the model, and take them off again: commit, detach, rename. All or nothing,
at whatever line an exception strikes."""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from .._torch import forget_compiled, hook_tables, remove_hooks
from ..core.arguments import checked
from ..core.errors import StateError
from .call.attention import attend, nothing
from .call.experts import experts_post_hook, experts_pre_hook
from .call.hooks import post_hook, pre_hook
from .call.root import root_post_hook, root_pre_hook
from .call.turns import swap_back
from .call.vocabulary import vocabulary_of
from .handle import Adapter, check_differentiable
from .layers.kinds import kind_named
from .layers.read import fingerprint
from .layers.tensors import is_sharded
from .model.held import hold, release
from .model.kind import Hooks, Kind
from .model.record import Record
from .model.site import Site, Slot, base_parameters, owned_tensors, place
from .model.state import SITE, STATE, ModelState, check_module, not_merged, outside_calls, record_of, state_of, unwrap
from .model.surroundings import own_surroundings
from .model.undo import Undo, all_or_nothing, restoring
from .start.staging import StagedTarget
from .state_dicts import Trainable, after_state_dict, before_load_state_dict, savers
from .targets.choose import check_owners

T = TypeVar("T")
HOOKS = Hooks(pre_hook, post_hook)
SWAPPING_HOOKS = Hooks(experts_pre_hook, experts_post_hook)
ATTENTION_HOOKS = Hooks(nothing, attend)
ROOT_HOOKS = {
    "_forward_pre_hooks": root_pre_hook,
    "_forward_hooks": root_post_hook,
    "_load_state_dict_pre_hooks": before_load_state_dict,
    "_state_dict_hooks": after_state_dict,
}
SAVING_HOOKS = {"_state_dict_hooks": after_state_dict}


def check_attachable(model: nn.Module, name: str) -> None:
    """Raise when an adapter cannot be added to this model under this name."""
    if not isinstance(name, str) or not name or not all(c.isalnum() or c in "_-" for c in name):
        raise StateError(f"an adapter's name consists of letters, digits, '_' and '-'; got {name!r}.")
    check_module(model)
    _check_not_distributed(model)
    _check_not_wrapped(model)
    model = unwrap(model)
    state = model.__dict__.get(STATE)
    _check_not_part(model, state)
    outside_calls(model, "adding or renaming an adapter")
    if state is None:
        return
    not_merged(state, "attaching or loading")
    if name in state.records:
        raise StateError(
            f"an adapter called {name!r} is attached already. Give the new one another name (name='second'), go on "
            f"training the present one (ll.adapters(model)[{name!r}].trainable = True), or ll.detach(model, {name!r}) "
            "first."
        )


def _check_not_distributed(model: nn.Module) -> None:
    """Raise on a model whose parameters were dealt out to ranks already."""
    if getattr(unwrap(model), "_tp_size", None):
        raise StateError(
            "the model is tensor-parallel (tp_plan): each rank holds a part of every weight, for which adapters have "
            "no rule. Load it without tp_plan, attach, and use FSDP2 (fully_shard), DistributedDataParallel or "
            "DeepSpeed. For serving, merge the adapter first and save the model."
        )
    wrapper = type(model).__name__
    sharded = next((n for n, p in base_parameters(model) if is_sharded(p)), None)
    wrapped = wrapper in ("DistributedDataParallel", "FullyShardedDataParallel")
    if sharded is None and not wrapped and not any(type(m).__name__.startswith("FSDP") for m in model.modules()):
        return
    how = f"wrapped in {wrapper}" if sharded is None else f"sharded ({sharded})"
    raise StateError(
        f"the model is already {how}; adapters added now would not be synchronised between ranks. Attach first, then "
        "call fully_shard / DistributedDataParallel / deepspeed.initialize."
    )


def _check_not_wrapped(model: nn.Module) -> None:
    """Raise on a model that another adapter library has put its own layers into."""
    path = next((p for p, m in model.named_modules() if "base_layer" in m._modules and hasattr(m, "set_adapter")), None)
    wrapped = callable(getattr(model, "get_base_model", None)) and "base_model" in model._modules
    if path is None and not wrapped:
        return
    where = f"is a {type(model).__name__}" if wrapped else f"holds an adapter of PEFT ({path})"
    cure = "load the base without that adapter (what load_adapter and add_adapter did cannot be undone)"
    if wrapped:
        cure = "model = model.merge_and_unload(), which keeps that adapter in the weights, or model = model.unload()"
    raise StateError(
        f"the model {where}, and an adapter added now would stand on PEFT's own tensors. First {cure}. Then "
        "ll.attach(model, cfg), or ll.load(model, folder) for a LoRA that PEFT wrote."
    )


def _check_not_part(model: nn.Module, state: ModelState | None) -> None:
    """Raise where a layer belongs to the adapters of another model around or inside this one."""
    for path, module in model.named_modules():
        if SITE in module.__dict__ and module.__dict__[SITE].state is not state:
            root = next((p for p, m in model.named_modules() if m is not model and STATE in m.__dict__), None)
            raise StateError(
                f"{path or 'the layer'!r} belongs to an adapter of "
                f"{'a larger model' if root is None else repr(root)}, which chooses its adapters on its own. Attach "
                "to the whole model (target_names says where), or ll.detach the other adapter first."
            )


def commit(
    model: nn.Module, record: Record, staged: list[StagedTarget], trainable: bool, plan: object = None
) -> Adapter:
    """Register staged tensors and hooks. Everything that can be checked is checked before the first change."""

    def steps(undo: Undo) -> Adapter:
        with own_surroundings():
            return put_on(model, record, staged, trainable, undo, plan)

    return change(model, "adding an adapter", steps)


def change(model: nn.Module, what: str, steps: Callable[[Undo], T]) -> T:
    """The steps of a verb that changes what runs: all or none of them, and no call of the model in another thread
    meanwhile."""
    state: ModelState | None = model.__dict__.get(STATE)
    before = None if state is None else state.changing

    def go_on() -> None:
        if state is not None:
            state.changing = before

    def alone(undo: Undo) -> T:
        undo(go_on)
        if state is not None:
            state.changing = threading.get_ident()  # from here on, calls in other threads wait
        outside_calls(model, what)
        done = steps(undo)
        go_on()
        return done

    return all_or_nothing(alone)


def put_on(
    model: nn.Module,
    record: Record,
    staged: list[StagedTarget],
    trainable: bool,
    undo: Undo,
    plan: object = None,
) -> Adapter:
    """The steps of `commit`."""
    state = state_of(model, create=True)
    if STATE not in model.__dict__:
        state.own = tuple(model._parameters)
    staged = _in_model_order(model, staged)
    record.trainable = trainable
    record.targets = {view.path: view.target for view in staged}
    check_owners(record.targets)
    if trainable:
        check_differentiable(model, record)
    modules = {view.path: view.module for view in staged}
    places = {**modules, "": model}
    previous = next(reversed(state.records.values()), None)
    for view in staged:
        _finish(view, record, places)
        if previous is not None and view.path in previous.targets:
            view.target.share(previous.targets[view.path])
    found = {
        view.path: kind_named(view.target.kind).inspect(view.module, view.path)
        for view in staged
        if view.device.type != "meta"
    }
    vocabulary = vocabulary_of(model, modules)
    training = [(path, p) for path, p in base_parameters(model) if p.requires_grad]

    for _, p in training:
        undo(lambda p=p: p.requires_grad_(True))
        p.requires_grad_(False)
    for view in staged:
        site = _site_of(view, state, undo)
        _register(view, record, places, undo)
        site.found, site.inspected = found.get(view.path), view.path in found
        owners = {short: places[place(view.target, short, record.name)[0]] for short in view.target.shared}
        undo(lambda site=site: site.remove(record.name))
        site.add(Slot(record, view.target, owners))
    undo(restoring(state))
    undo(lambda: state.records.pop(record.name, None))
    _adopt(model, state, undo)
    state.base_trainable = list(dict.fromkeys((*state.base_trainable, *(path for path, _ in training))))
    state.vocabulary = {**state.vocabulary, **vocabulary}
    state.records[record.name] = record
    state.select(((record.name, 1.0),))
    state.row_epoch += 1
    state.links, state.unhooked, state.train_calls, state.gradless = None, {}, 0, {}
    forget_compiled()
    return Adapter(model, record.name, plan)


def _in_model_order(model: nn.Module, staged: list[StagedTarget]) -> list[StagedTarget]:
    """As the layers stand in the model, wherever the adapter comes from: an optimiser's state knows its parameters by
    their number alone, and must fit an adapter that was loaded as it fitted the one that was attached."""
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}

    def where(view: StagedTarget) -> int:
        parent = view.path.rpartition(".")[0]  # a bank of experts is no module of the model yet
        return order.get(view.path, order.get(parent, len(order)))

    return sorted(staged, key=where)


def _finish(view: StagedTarget, record: Record, modules: dict[str, nn.Module]) -> None:
    """What a target remembers of its layer; raises where its tensors would hide something."""
    target = view.target
    # a start drawn by a lambda has done its work, and the model must stay picklable
    target.specs = {k: dataclasses.replace(s, init="empty") if callable(s.init) else s for k, s in target.specs.items()}
    target.base = fingerprint(view.module)
    for short in view.tensors:
        path, attribute = place(target, short, record.name)
        if hasattr(modules[path], attribute):
            raise StateError(
                f"{path or 'the model'} has an attribute {attribute!r} of its own; choose another adapter name."
            )


def _site_of(view: StagedTarget, state: ModelState, undo: Undo) -> Site:
    """The layer's site; a new one comes with the hooks."""
    layer, path, kind = view.module, view.path, kind_named(view.target.kind)
    site: Site | None = layer.__dict__.get(SITE)
    if site is not None:
        undo(restoring(site))
        return site
    site = Site(path, kind, state, tuple(layer._parameters))
    undo(lambda: _take_off(layer, path, kind))
    layer.__dict__[SITE] = site
    kind.join(layer, path, _hooks(kind))
    return site


def _register(view: StagedTarget, record: Record, modules: dict[str, nn.Module], undo: Undo) -> None:
    """Put a target's tensors onto its layer, and those that others use too onto the model itself."""
    for short, spec in view.target.specs.items():
        path, attribute = place(view.target, short, record.name)
        module, tensor = modules[path], view.tensors[short]
        undo(lambda m=module, a=attribute: _drop(m, a))
        if spec.as_buffer:
            module.register_buffer(attribute, tensor)
        else:
            grad = record.trainable and spec.is_trained
            module.register_parameter(attribute, nn.Parameter(tensor, requires_grad=grad))


def _drop(module: nn.Module, attribute: str) -> None:
    module._parameters.pop(attribute, None)
    module._buffers.pop(attribute, None)


def _take_off(layer: nn.Module, path: str, kind: Kind) -> None:
    """Hooks and site off a layer."""
    swap_back(kind.hooked(layer))  # what an interrupted call has left
    kind.part(layer, path, _hooks(kind))
    layer.__dict__.pop(SITE, None)


def _hooks(kind: Kind) -> Hooks:
    if kind.attends:
        return ATTENTION_HOOKS
    return SWAPPING_HOOKS if kind.swaps_weight else HOOKS


def _adopt(model: nn.Module, state: ModelState, undo: Undo) -> None:
    """Make a model the root of its adapters, with the hooks of whole calls."""
    if STATE in model.__dict__:
        return
    undo(lambda: (_remove_root_hooks(model), model.__dict__.pop(STATE, None), Trainable.take_off(model)))
    state.parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]
    model.__dict__[STATE] = state
    Trainable.put_on(model)
    state.held = hold(model, undo)
    model.register_forward_pre_hook(root_pre_hook, with_kwargs=True)
    model.register_forward_hook(root_post_hook, with_kwargs=True, always_call=True)
    model.register_load_state_dict_pre_hook(before_load_state_dict)
    for module in (model, *savers(model)):
        module.register_state_dict_post_hook(after_state_dict)


def _remove_root_hooks(model: nn.Module) -> None:
    remove_hooks(model, ROOT_HOOKS)
    for module in savers(model):
        remove_hooks(module, SAVING_HOOKS)


@checked
def detach(model: nn.Module, name: str | None = None) -> None:
    """Remove one adapter, or all of them (`name=None`). With the last one go the hooks, and the base's `requires_grad`
    comes back.

    Raises:
        StateError: unknown name, merged model, or a model that was sharded after attaching (the sharding owns the
            tensors).
    """
    model = unwrap(model)
    state = state_of(model)
    check_free(model, state, "ll.detach")
    names = list(state.records) if name is None else [record_of(model, name).name]
    change(model, "ll.detach", lambda undo: take_off(model, names, undo))


def check_free(model: nn.Module, state: ModelState, verb: str) -> None:
    """Raise where adapters cannot be taken off: merged, inside a selection's block, or sharded."""
    not_merged(state, f"{verb}(model)")
    outside_calls(model, verb)
    if any(is_sharded(p) for _, p in base_parameters(model)):
        raise StateError(
            "the model is sharded, and the sharding owns the adapter's tensors. Save the adapter, and load it into a "
            "fresh model instead."
        )


def take_off(model: nn.Module, names: list[str], undo: Undo) -> None:
    """The steps of `detach`."""
    state, modules = state_of(model), dict(model.named_modules())
    undo(restoring(state, state.records))
    for record in [state.records.pop(n) for n in names]:
        for target in record.targets.values():
            layer = modules.get(target.path)
            site: Site | None = None if layer is None else layer.__dict__.get(SITE)
            if layer is not None and site is not None:  # otherwise something replaced the layer
                _take_from(layer, site, record, undo)
            for path, attribute in (place(target, short, record.name) for short in target.specs):
                if path in modules:
                    undo(restoring(modules[path]._parameters, modules[path]._buffers))
                    _drop(modules[path], attribute)
    state.select(tuple((n, w) for n, w in state.active if n in state.records))
    state.row_epoch += 1
    state.links = None
    if not state.records:
        _release(model, state, undo)
    forget_compiled()


def _take_from(layer: nn.Module, site: Site, record: Record, undo: Undo) -> None:
    """One adapter off one layer, and the hooks with the last one."""
    undo(restoring(site, site.slots))
    site.remove(record.name)
    if not site.slots:
        carrier = site.kind.hooked(layer)
        undo(restoring(layer, carrier._modules, *hook_tables(carrier)))
        _take_off(layer, site.path, site.kind)


def _release(model: nn.Module, state: ModelState, undo: Undo) -> None:
    """A model without adapters is a plain one: its parameters train again, its hooks are gone."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for p in (parameters[n] for n in state.base_trainable if n in parameters):
        undo(lambda p=p: p.requires_grad_(False))
        p.requires_grad_(True)
    release(model, state.held, undo)
    undo(restoring(model, *(table for m in (model, *savers(model)) for table in hook_tables(m))))
    del model.__dict__[STATE]
    Trainable.take_off(model)
    _remove_root_hooks(model)


@checked
def rename(model: nn.Module, old: str, new: str) -> None:
    """Give an adapter another name; its tensors stay the same objects, so optimisers keep working.

    Raises:
        StateError: unknown or taken name, a layer that was replaced, a merged model.
    """
    model = unwrap(model)
    record, state = record_of(model, old), state_of(model)
    check_attachable(model, new)
    list(owned_tensors(model, record))  # raises where a layer was replaced
    order = [new if n == old else n for n in state.records]

    def steps(undo: Undo) -> None:
        give_name(model, record, new, undo)
        put_in_order(model, order, undo)

    change(model, "ll.rename", steps)


def give_name(model: nn.Module, record: Record, new: str, undo: Undo) -> None:
    """The steps of `rename`; the adapter comes last in the order."""
    state, old = state_of(model), record.name
    undo(restoring(state, state.records, record))
    record.name = new
    for path, target in record.targets.items():
        for short in target.specs:
            where, was = place(target, short, old)
            module = model.get_submodule(where)
            undo(restoring(module._parameters, module._buffers))
            _rename_key(module, was, place(target, short, new)[1])
        site: Site = model.get_submodule(path).__dict__[SITE]
        undo(restoring(site, site.slots))
        site.slots[new] = Slot(record, target, site.slots.pop(old).owners)
    state.row_epoch += 1
    state.links = None
    state.records[new] = state.records.pop(old)
    state.select(tuple((new if n == old else n, w) for n, w in state.active))
    forget_compiled()


def put_in_order(model: nn.Module, names: list[str], undo: Undo) -> None:
    """Let the adapters act in this order."""
    state = state_of(model)
    paths = dict.fromkeys(path for record in state.records.values() for path in record.targets)
    layers = dict(model.named_modules())
    undo(restoring(state.records))
    _sort(state.records, names)
    for path in paths:
        site: Site | None = layers[path].__dict__.get(SITE) if path in layers else None
        if site is not None:  # otherwise something replaced the layer
            undo(restoring(site.slots))
            _sort(site.slots, names)


def _sort(table: dict[str, Any], names: list[str]) -> None:
    for name in names:
        if name in table:
            table[name] = table.pop(name)


def _rename_key(layer: nn.Module, old: str, new: str) -> None:
    if old in layer._parameters:
        layer._parameters[new] = layer._parameters.pop(old)
    if old in layer._buffers:
        layer._buffers[new] = layer._buffers.pop(old)
