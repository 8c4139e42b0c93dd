"""attach, detach, rename: put an adapter's tensors and the two hooks on the layers, or take them off again. All or nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.config import AdapterConfig
from ..core.errors import ConfigError, StateError, TargetError, WeightError
from ..core.registry import get_variant
from . import weights
from .bank import Bank
from .calibrate import Targets
from .experts import experts_post_hook, experts_pre_hook, init_each, try_experts
from .handle import Adapter
from .hooks import post_hook, pre_hook, root_post_hook, root_pre_hook
from .norms import read_norm
from .outside import after_state_dict, before_load_state_dict, vocabulary_of
from .plan import Plan, plan
from .progress import track
from .reference import check_reference, start_from_reference
from .staging import StagedTarget, TrialView, stage
from .state import (
    DEFAULT,
    SITE,
    STATE,
    Record,
    Site,
    Slot,
    outside_scope,
    record_of,
    reset_compiled,
    state_of,
    stored_name,
    unwrap,
)
from .virtual import PLACES, try_page

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


def attach(
    model: nn.Module,
    cfg: AdapterConfig,
    calibration_data: Any = None,
    name: str = DEFAULT,
    reference_weights: str | Path | None = None,
) -> Adapter:
    """Freeze the base, add one adapter to the chosen layers and make it the one active adapter.

    Args:
        model: any module; wrappers of torch.compile are looked through.
        cfg: what to attach and where.
        calibration_data: batches for methods that start from data: an iterable of dicts (`model(**batch)`), tuples or tensors. Never stored.
        name: letters, digits, `_` and `-`; several adapters of one model have different names.
        reference_weights: a full-precision checkpoint of the same model (safetensors file, folder, hub id), read one tensor at a time. LoRA then starts
            at the best rank-r part of W_ref − W, and so takes back most of what quantising the base lost (the aim of LoftQ, arXiv 2310.08659).

    Returns:
        The adapter's handle: `parameters()`, `param_groups(lr)`, `trainable`, and it prints as the plan.

    Raises:
        StateError: the name is taken, the model is merged, or it is already sharded or wrapped for data-parallel training.
        TargetError, ConfigError, WeightError: see `plan`; the model is untouched.
    """
    check_attachable(model, name)
    model = unwrap(model)
    the_plan = plan(model, cfg)
    cfg, variant = the_plan.cfg, get_variant(the_plan.cfg.variant)
    if variant.needs_data and calibration_data is None:
        raise ConfigError(
            f"variant {variant.name!r} starts from data: ll.attach(model, cfg, calibration_data=batches)."
        )
    if calibration_data is not None and variant.group_init is None:
        raise ConfigError(f"variant {variant.name!r} uses no calibration data; leave calibration_data out.")
    if reference_weights is not None:
        check_reference(variant)
    if variant.needs_weight:
        check_readable(model, the_plan)
    record = Record(name, variant, cfg, {t.path: t for t in the_plan.targets})
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        staged = stage(model, record)
        beside = [view for view in staged if view.cfg.variant != cfg.variant]
        for view in track(staged, f"{variant.name} init"):
            page, init, kind = view.target.variant.forward, view.target.variant.init, view.target.kind
            if isinstance(view.module, Bank):
                if init is not None:
                    init_each(view, view.module, init)
                try_experts(view, view.module)
            elif init is not None:
                init(view, view.cfg)
            if kind in PLACES and page is not None and view.device.type != "meta":
                try_page(page, TrialView(view), view.module, kind, view.device, view.target.d_out)
        if variant.group_init is not None:
            targets = Targets(model, [view for view in staged if view not in beside])
            variant.group_init(model, targets, cfg, calibration_data)
            staged = [*targets, *beside]
            if not targets:
                raise TargetError(f"variant {variant.name!r} kept no target after calibration.")
            the_plan.keep([view.target for view in staged])
        if reference_weights is not None:
            own = [view for view in staged if view not in beside]
            the_plan.notes.append(str(start_from_reference(model, own, reference_weights)))
    handle = commit(model, record, staged, trainable=True)
    handle._plan = the_plan
    return handle


def check_attachable(model: nn.Module, name: str) -> None:
    """Raise when an adapter cannot be added to this model under this name."""
    if not name or not all(c.isalnum() or c in "_-" for c in name):
        raise StateError(f"an adapter's name consists of letters, digits, '_' and '-'; got {name!r}.")
    wrapper = type(model).__name__
    sharded = [n for n, p in model.named_parameters() if weights.is_sharded(p)]
    if (
        wrapper in ("DistributedDataParallel", "FullyShardedDataParallel")
        or sharded
        or any(type(m).__name__.startswith("FSDP") for m in model.modules())
    ):
        raise StateError(
            f"the model is already {'wrapped in ' + wrapper if not sharded else 'sharded (' + sharded[0] + ')'}; adapters added now would not be synchronised between ranks. "
            "Attach first, then call fully_shard / DistributedDataParallel / deepspeed.initialize."
        )
    model = unwrap(model)
    state = model.__dict__.get(STATE)
    for path, module in model.named_modules():
        if SITE in module.__dict__ and module.__dict__[SITE].state is not state:
            root = next((p for p, m in model.named_modules() if m is not model and STATE in m.__dict__), None)
            raise StateError(
                f"{path or 'the layer'!r} belongs to an adapter of {'a larger model' if root is None else repr(root)}, which chooses its adapters on its own. "
                "Attach to the whole model (target_names says where), or ll.detach the other adapter first."
            )
    if state is None:
        return
    outside_scope(state, "adding or renaming an adapter")
    if state.merged is not None:
        raise StateError("the model is merged; call ll.unmerge(model) before attaching or loading.")
    if name in state.records:
        raise StateError(
            f"an adapter called {name!r} is attached already. Give the new one another name (name='second'), "
            f"go on training the present one (ll.adapters(model)[{name!r}].trainable = True), or ll.detach(model, {name!r}) first."
        )


def check_readable(model: nn.Module, the_plan: Plan) -> None:
    """Raise when the variant reads weights and a target's weight is quantised without permission."""
    if the_plan.cfg.dequantize:
        return
    for t in the_plan.targets:
        if not t.variant.needs_weight or t.kind != "linear":
            continue
        module = model.get_submodule(t.path)
        if weights.is_quantised(module):
            raise WeightError(
                f"{t.path}: variant {the_plan.cfg.variant!r} reads the dense weight, and this {type(module).__name__} is quantised. "
                f"Allow reading it with {type(the_plan.cfg).__name__}(..., dequantize=True), or use a variant that does not need the weight."
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
        view.target.base = weights.fingerprint(view.module) if view.target.kind != "block" else {}
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
    reset_compiled()
    return Adapter(model, record.name)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Remove one adapter, or all of them (`name=None`). With the last one go the hooks, and the base's `requires_grad` comes back.

    Raises:
        StateError: unknown name, merged model, or a model that was sharded after attaching (the sharding owns the tensors).
    """
    model = unwrap(model)
    state = state_of(model)
    if state.merged is not None:
        raise StateError("the model is merged; call ll.unmerge(model) before ll.detach(model).")
    outside_scope(state, "ll.detach")
    if any(weights.is_sharded(p) for p in model.parameters()):
        raise StateError(
            "the model is sharded, and the sharding owns the adapter's tensors. Save the adapter, and load it into a fresh model instead."
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
    reset_compiled()


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
    reset_compiled()


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
