"""Which layers a config chooses, and the tensors that its method wants there."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from ...core.config import AdapterConfig, matches
from ...core.errors import LoraLiteError, TargetError, did_you_mean, listing
from ...core.registry import get_variant
from ...core.spec import ParamSpec
from ...core.variant import Variant
from ..layers.kinds import DEFAULT_KIND, kind_named
from ..layers.tensors import bias_of
from ..model.kind import Kind, not_what_it_seems
from ..model.record import Target
from .structure import Place, Structure


def count_hits(
    cfg: AdapterConfig, fields: tuple[str, ...] | None, places: list[Place], what: str, others: Sequence[Place] = ()
) -> dict[str, int]:
    """Pattern -> number of matches, for the named fields or for all others; a pattern without a match raises.

    Args:
        others: every layer of the model; one of another kind that the pattern matches is named in the error.
    """
    names = ("target_names", "exclude_names", "train_modules")
    hits: dict[str, int] = {}
    for name, pattern in cfg.patterns():
        if (name in fields) if fields is not None else (name not in names):
            hits[f"{name} {pattern!r}"] = n = sum(matches(pattern, s.path) for s in places)
            if n == 0:
                kinds = sorted({s.kind for s in others if matches(pattern, s.path)})
                if kinds and name == "target_names":
                    raise TargetError(
                        f"{name}: {pattern!r} matches layers of the kind {' and '.join(kinds)} only, and the config "
                        f"takes {' and '.join(cfg.target_kinds)}. To adapt them too: "
                        f"target_kinds={(*cfg.target_kinds, *kinds)!r}."
                    )
                raise TargetError(
                    f"{name}: {pattern!r} matches none of the {len(places)} "
                    f"{what}.{did_you_mean(pattern, tails(places))} ll.plan(model, ll.{type(cfg).__name__}()) shows "
                    "all of them."
                )
    return hits


def places_of(structure: Structure, variant: type[Variant], cfg: AdapterConfig) -> list[Place]:
    """Where a method may stand: the layers of the kinds that the config names, or the blocks."""
    kind = kind_named(variant.site)
    if not kind.apart:
        kinds = [name for name in cfg.target_kinds if not kind_named(name).apart]
        if len(kinds) < len(cfg.target_kinds):
            raise TargetError(
                f"target_kinds={cfg.target_kinds!r}: methods that stand on the stream after blocks, or at the "
                f"attention, choose it themselves, and variant {variant.name!r} stands on layers; name kinds of layers."
            )
        return [s for s in structure.places if s.kind in kinds]
    if cfg.target_kinds != type(cfg)(variant=cfg.variant).target_kinds:
        where = "the residual stream after blocks" if kind.stream else f"places of the kind {kind.name!r}"
        raise TargetError(
            f"variant {variant.name!r} hooks {where}, so target_kinds={cfg.target_kinds!r} says nothing to it; leave "
            "it out."
        )
    if not kind.stream:
        return _places_apart(structure, kind, variant)
    blocks = [b for b in structure.streams if b.width is not None]
    if not blocks:
        raise TargetError(
            "this variant hooks the residual stream after blocks, and the model has no list of blocks such as "
            "model.layers."
        )
    return [
        Place(b.path, b.module, b.width, b.width, b.index, variant.site, kind=variant.site, n_layers=b.n_layers)  # type: ignore[arg-type]
        for b in blocks
    ]


def _places_apart(structure: Structure, kind: Kind, variant: type[Variant]) -> list[Place]:
    found = [s for s in structure.places if s.kind == kind.name]
    if kind.named:
        found = [dataclasses.replace(s, kind=kind.name) for s in structure.composite]
    if not found:
        raise TargetError(f"variant {variant.name!r} stands on {kind.name}, and {kind.absent}")
    return found


def select(places: list[Place], cfg: AdapterConfig) -> tuple[list[Place], list[tuple[str, str]]]:
    """The chosen layers, and (path, reason) of the others. Names are filtered first, roles looked at afterwards."""
    check_layers(cfg, places)
    in_blocks = any(s.layer is not None for s in places)
    chosen, left = [], []
    for s in places:
        reason = _left_out(s, cfg, in_blocks)
        if reason:
            left.append((s.path, reason))
        elif why := "" if _is_named(s, cfg) else kind_named(s.kind).strange(s.module):
            left.append((s.path, f"it has a forward of its own and {why}"))
        else:
            chosen.append(s)
    if not chosen:
        _raise_none_chosen(left, cfg)
    return chosen, left


def _left_out(s: Place, cfg: AdapterConfig, in_blocks: bool) -> str:
    """Why a config leaves a layer out; empty where it takes it."""
    named = _is_named(s, cfg)
    outside = in_blocks and s.layer is None and kind_named(s.kind).inside_blocks
    reasons = {
        "not matched by target_names": cfg.target_names is not None and not named,
        "exclude_names": any(matches(p, s.path) for p in cfg.exclude_names),
        "output head; name it in target_names to adapt it": s.is_head and not named,
        "outside of the blocks; name it in target_names to adapt it": outside and not named,
        "not in layers": cfg.layers is not None and not in_layers(s, cfg.layers),
        f"role {s.role}": cfg.target_roles is not None and s.role not in cfg.target_roles,
        f"never called as a module: {s.uncalled}": bool(s.uncalled) and not named,
        f"not always called as a module: {s.bypassed}; name it in target_names": bool(s.bypassed) and not named,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _is_named(s: Place, cfg: AdapterConfig) -> bool:
    return cfg.target_names is not None and any(matches(p, s.path) for p in cfg.target_names)


def _raise_none_chosen(left: list[tuple[str, str]], cfg: AdapterConfig) -> NoReturn:
    why = Counter(reason for _, reason in left)
    cure = "lora_lite adapts linear-like layers; this model has none."
    if left:
        cure = f"Print ll.plan(model, ll.{type(cfg).__name__}()) to see names and roles."
        if cfg.target_roles is not None:
            cure += (
                f" target_roles={cfg.target_roles} with target_kinds={cfg.target_kinds}: target_roles=None takes all."
            )
    raise TargetError(
        f"the config chooses none of the model's {len(left)} layers "
        f"({', '.join(f'{n} {r}' for r, n in why.most_common(3)) or 'none found'}). {cure}"
    )


def target_of(place: Place, cfg: AdapterConfig) -> Target:
    """The target on one layer, for a config that `for_target` has been through."""
    cfg = cfg.for_layer(bias_of(place.module) is not None)
    copies = kind_named(place.kind).copies(place.module)
    return make_target(place.path, place.d_in, place.d_out, cfg, place.kind, copies)


def make_target(
    path: str, d_in: int, d_out: int, cfg: AdapterConfig, kind: str = DEFAULT_KIND, experts: int = 0
) -> Target:
    """The tensors that the variant wants on one layer, checked."""
    variant = get_variant(cfg.variant)
    try:
        specs = variant.param_specs(d_in, d_out, cfg)
    except LoraLiteError as e:
        raise type(e)(f"{path}: {e}") from None
    _check_names(specs, f"{variant.name}.param_specs")
    if experts:
        specs = {k: dataclasses.replace(s, shape=(experts, *s.shape)) for k, s in specs.items()}
    return Target(path, d_in, d_out, cfg, dict(specs), kind, experts)


def _check_names(specs: dict[str, ParamSpec], where: str) -> None:
    for short in specs:
        if not short.startswith("lora_") or any(c in short for c in "@.:"):
            raise TargetError(
                f"{where} names a tensor {short!r}; names begin with 'lora_' and hold neither '@', '.' nor ':'."
            )


def add_shared(
    targets: list[Target],
    cfg: AdapterConfig,
    owner_of: Callable[[list[Target], str], Target] = lambda group, short: group[0],
) -> None:
    """Give each shared tensor to one target of its group, the first of it at attach, and point the group to it."""
    variant = get_variant(cfg.variant)
    found = variant.shared_specs(targets, cfg)  # type: ignore[misc]
    for group, specs in [(targets, found)] if isinstance(found, dict) else found:
        _check_names(specs, f"{variant.name}.shared_specs")
        for short, spec in specs.items():
            taken = next((t for t in group if short in t.shared or short in t.specs), None)
            if taken is not None:
                raise TargetError(f"{taken.path}: {variant.name}.shared_specs gives it a second {short!r}.")
            owner = owner_of(group, short)
            owner.specs[short] = spec
            for t in group:
                t.shared[short] = owner.path


def check_owners(targets: dict[str, Target]) -> None:
    """Raise when a target went whose tensors others use."""
    for t in targets.values():
        lost = next((short for short, owner in t.shared.items() if owner not in targets), None)
        if lost is not None:
            raise TargetError(
                f"{t.path} shares {lost} with {t.shared[lost]}, which variant {t.cfg.variant!r} left out; a method "
                "must keep the first target of each group that shares tensors."
            )


def check_place(place: Place, structure: Structure, cfg: AdapterConfig) -> None:
    """Raise where the method cannot act on this layer, or would act elsewhere too."""
    if why := kind_named(place.kind).refuse(place.module, place.path, get_variant(cfg.variant), cfg):
        raise TargetError(f"{place.path}: {why}")
    if why := kind_named(place.kind).strange(place.module):
        raise TargetError(not_what_it_seems(place.module, place.path, why))
    if place.uncalled:
        raise TargetError(
            f"{place.path} is never called as a module ({place.uncalled}), so an adapter there would do nothing. Add "
            "it to exclude_names."
        )
    paths = structure.aliases.get(id(place.module))
    if paths:
        raise TargetError(
            f"one module has {len(paths)} paths ({listing(paths)}); an adapter on it would act at all of them. Add it "
            "to exclude_names, or give the model two modules."
        )


def in_layers(place: Place, layers: Iterable[int]) -> bool:
    """Whether a block's number is among these; negative ones count from the end of the block's own stack."""
    return place.layer is not None and any(i % place.n_layers == place.layer for i in layers if _exists(i, place))


def _exists(i: int, place: Place) -> bool:
    return -place.n_layers <= i < place.n_layers


def check_layers(cfg: AdapterConfig, places: list[Place]) -> None:
    """Raise where `layers` names a block that no stack has."""
    if cfg.layers is None:
        return
    inside = [s for s in places if s.layer is not None]
    if not inside:
        raise TargetError("layers: the model has no stack of blocks to count; use target_names.")
    missing = [i for i in cfg.layers if not any(in_layers(s, (i,)) for s in inside)]
    if missing or not cfg.layers:
        n = max(s.n_layers for s in inside)
        raise TargetError(f"layers: the model has no block {missing}; it has {n} blocks, 0 to {n - 1}.")


def tails(places: list[Place]) -> list[str]:
    return list(dict.fromkeys(part for s in places for part in (s.path.rsplit(".", 1)[-1], s.path)))
