"""`ll.attach`: freeze the base and add one adapter. All or nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._torch import hook_tables
from ..core.config import AdapterConfig
from ..core.errors import ConfigError, TargetError, WeightError
from ..core.registry import check_config, get_variant
from ..core.variant import Variant
from .commit import check_attachable, commit
from .handle import Adapter
from .layers.kinds import kind_named
from .layers.read import is_quantised
from .model.record import Record
from .model.site import base_parameters
from .model.state import DEFAULT, unwrap
from .model.surroundings import own_surroundings
from .model.undo import Undo, all_or_nothing, restoring
from .plan import Plan, plan
from .progress import track
from .start.calibrate import Targets, start_together
from .start.reference import check_reference, start_from_reference
from .start.staging import StagedTarget, stage, start


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
        calibration_data: batches for methods that start from data: an iterable of dicts (`model(**batch)`), tuples or
            tensors. Never stored.
        name: letters, digits, `_` and `-`; several adapters of one model have different names.
        reference_weights: a full-precision checkpoint of the same model (safetensors file, folder, hub id), read one
            tensor at a time. LoRA then starts at the best rank-r part of W_ref − W, and so takes back most of what
            quantising the base lost (the aim of LoftQ, arXiv 2310.08659).

    Returns:
        The adapter's handle: `parameters()`, `param_groups(lr)`, `trainable`, and it prints as the plan.

    Raises:
        StateError: the name is taken, the model is merged, or it is already sharded or wrapped for data-parallel
            training, or its weights were made in `inference_mode`.
        TargetError, ConfigError: see `plan`. WeightError: a weight that the method's start reads holds NaN, infinity
            or a number too large to be squared. In each case the model is untouched.
    """
    check_attachable(model, name)
    model = unwrap(model)

    def steps(undo: Undo) -> Adapter:
        undo(as_it_was(model))
        return _attach(model, cfg, calibration_data, name, reference_weights)

    return all_or_nothing(steps)


def _attach(
    model: nn.Module, cfg: AdapterConfig, calibration_data: Any, name: str, reference_weights: str | Path | None
) -> Adapter:
    """The steps of `attach`."""
    with own_surroundings():
        record, staged, the_plan = _staged(model, cfg, calibration_data, name, reference_weights)
    return commit(model, record, staged, trainable=True, plan=the_plan)


def _staged(
    model: nn.Module, cfg: AdapterConfig, calibration_data: Any, name: str, reference_weights: str | Path | None
) -> tuple[Record, list[StagedTarget], Plan]:
    """The adapter, started and not yet on the model."""
    the_plan = plan(model, with_a_seed(cfg))
    cfg, variant = the_plan.cfg, get_variant(the_plan.cfg.variant)
    _check_data(variant, calibration_data)
    if reference_weights is not None:
        check_reference(variant)
    if variant.needs_weight:
        check_readable(model, the_plan)
    record = Record(name, variant, cfg, {t.path: t for t in the_plan.targets})
    with torch.random.fork_rng(devices=[]):
        staged = stage(model, record)
        for view in track(staged, f"{variant.name} init"):
            start(view)
        if variant.group_init is not None:
            staged = _start_from_data(model, variant, staged, cfg, calibration_data)
            the_plan.keep([view.target for view in staged])
        if reference_weights is not None:
            own = [view for view in staged if view.cfg.variant == cfg.variant]
            the_plan.notes.append(str(start_from_reference(model, own, reference_weights)))
    return record, staged, the_plan


def with_a_seed(cfg: AdapterConfig) -> AdapterConfig:
    """The config; where its seed is None, with one from torch's global generator."""
    check_config(cfg)
    if cfg.seed is not None:
        return cfg
    return dataclasses.replace(cfg, seed=int(torch.randint(1 << 31, ())))


def as_it_was(model: nn.Module) -> Callable[[], None]:
    """How to give a model back what a pass of data changes for a while: modes, gradient flags, hooks, and the global
    random state."""
    modes = {m: m.training for m in model.modules()}
    flags = {p: p.requires_grad for _, p in base_parameters(model)}
    hooks = restoring(*(table for m in modes for table in hook_tables(m)))
    drawn = torch.get_rng_state()

    def restore() -> None:
        for m, mode in modes.items():
            m.training = mode
        for p, flag in flags.items():
            if p.requires_grad != flag:  # a tensor of inference mode takes no flag
                p.requires_grad_(flag)
        hooks()
        torch.set_rng_state(drawn)

    return restore


def _check_data(variant: type[Variant], calibration_data: Any) -> None:
    """Raise where data is missing, or given to a method that would not look at it."""
    if variant.needs_data and calibration_data is None:
        raise ConfigError(
            f"variant {variant.name!r} starts from data: ll.attach(model, cfg, calibration_data=batches)."
        )
    if calibration_data is not None and variant.group_init is None:
        raise ConfigError(f"variant {variant.name!r} uses no calibration data; leave calibration_data out.")


def _start_from_data(
    model: nn.Module, variant: type[Variant], staged: list[StagedTarget], cfg: AdapterConfig, data: Any
) -> list[StagedTarget]:
    """The method's start of all its targets together; those that it keeps, and the modules trained whole beside it."""
    beside = [view for view in staged if view.cfg.variant != cfg.variant]
    targets = Targets(model, [view for view in staged if view not in beside])
    start_together(model, targets, cfg, data)
    if not targets:
        raise TargetError(f"variant {variant.name!r} kept no target after calibration.")
    return [*targets, *beside]


def check_readable(model: nn.Module, the_plan: Plan) -> None:
    """Raise when the variant reads weights and a target's weight is quantised without permission."""
    if the_plan.cfg.dequantize:
        return
    for t in the_plan.targets:
        if not t.variant.needs_weight or not kind_named(t.kind).replaceable:
            continue
        module = model.get_submodule(t.path)
        if is_quantised(module):
            raise WeightError(
                f"{t.path}: variant {the_plan.cfg.variant!r} reads the dense weight, and this {type(module).__name__} "
                f"is quantised. Allow reading it with {type(the_plan.cfg).__name__}(..., dequantize=True), or use a "
                "variant that does not need the weight."
            )
