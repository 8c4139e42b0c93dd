"""Which layers a config chooses, and the tensors that its method wants there."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

from torch import nn

from ...core.config import AdapterConfig, matches
from ...core.errors import LoraLiteError, TargetError, did_you_mean, listing
from ...core.registry import get_variant
from ...core.spec import ParamSpec
from ..layers.bank import Bank
from ..layers.kinds import CONVS, bias_of
from ..model.record import Target
from .structure import Place, Structure


def check_method(path: str, cfg: AdapterConfig) -> None:
    """Refuse what a swapped-in weight cannot be, before anything is attached."""
    variant = get_variant(cfg.variant)
    why = (
        "is not affine in its layer's input"
        if not variant.affine or variant.site == "block"
        else "starts from data"
        if variant.group_init is not None
        else "has a schedule over single matrices"
        if variant.on_step is not None
        else "shares tensors between layers"
        if variant.shared_specs is not None
        else ""
    )
    if why:
        raise TargetError(
            f"{path}: variant {variant.name!r} {why}, so it cannot stand on fused experts; take 'experts' out of "
            "target_kinds."
        )
    if cfg.dropout:
        raise TargetError(
            f"{path}: the experts' weight is adapted, not their input, so dropout has nothing to act on; set dropout=0."
        )


def count_hits(cfg: AdapterConfig, fields: tuple[str, ...] | None, sites: list[Place], what: str) -> dict[str, int]:
    """Pattern -> number of matches, for the named fields or for all others; a pattern without a match raises."""
    names = ("target_names", "exclude_names", "train_modules")
    hits: dict[str, int] = {}
    for name, pattern in cfg.patterns():
        if (name in fields) if fields is not None else (name not in names):
            hits[f"{name} {pattern!r}"] = n = sum(matches(pattern, s.path) for s in sites)
            if n == 0:
                raise TargetError(
                    f"{name}: {pattern!r} matches none of the {len(sites)} "
                    f"{what}.{did_you_mean(pattern, tails(sites))} ll.plan(model, ll.{type(cfg).__name__}()) shows "
                    "all of them."
                )
    return hits


def select(sites: list[Place], structure: Structure, cfg: AdapterConfig) -> tuple[list[Place], list[tuple[str, str]]]:
    """The chosen layers, and (path, reason) of the others. Names are filtered first, roles looked at afterwards."""
    wanted_layers = layer_set(cfg, structure, sites)
    in_blocks = any(s.layer is not None for s in sites)
    chosen, left = [], []
    for s in sites:
        named = cfg.target_names is not None and any(matches(p, s.path) for p in cfg.target_names)
        if cfg.target_names is not None and not named:
            left.append((s.path, "not matched by target_names"))
        elif any(matches(p, s.path) for p in cfg.exclude_names):
            left.append((s.path, "exclude_names"))
        elif cfg.target_names is None and s.is_head:
            left.append((s.path, "output head; name it in target_names to adapt it"))
        elif cfg.target_names is None and in_blocks and s.layer is None and s.kind == "linear":
            left.append((s.path, "outside of the blocks; name it in target_names to adapt it"))
        elif wanted_layers is not None and s.layer not in wanted_layers:
            left.append((s.path, "not in layers"))
        elif cfg.target_roles is not None and s.role not in cfg.target_roles:
            left.append((s.path, f"role {s.role}"))
        elif s.uncalled and not named:
            left.append((s.path, f"never called as a module: {s.uncalled}"))
        else:
            chosen.append(s)
    if not chosen:
        why = Counter(reason for _, reason in left)
        cure = (
            f"Print ll.plan(model, ll.{type(cfg).__name__}()) to see names and roles."
            if left
            else "lora_lite adapts linear-like layers; this model has none."
        )
        raise TargetError(
            f"the config chooses none of the model's {len(sites)} layers "
            f"({', '.join(f'{n} {r}' for r, n in why.most_common(3)) or 'none found'}). {cure}"
        )
    return chosen, left


def target_of(site: Place, cfg: AdapterConfig) -> Target:
    """The target on one layer, for a config that `for_target` has been through."""
    cfg = cfg.for_layer(bias_of(site.module) is not None)
    experts = site.module.n_experts if isinstance(site.module, Bank) else 0
    return make_target(site.path, site.d_in, site.d_out, cfg, site.kind, experts)


def make_target(path: str, d_in: int, d_out: int, cfg: AdapterConfig, kind: str = "linear", experts: int = 0) -> Target:
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


def check_site(site: Place, structure: Structure, cfg: AdapterConfig) -> None:
    variant = get_variant(cfg.variant)
    if site.kind == "norm" and not variant.norms:
        raise TargetError(
            f"{site.path}: variant {variant.name!r} cannot stand on a norm; take it out of target_kinds, or train "
            f"norms whole: train_modules=({site.path.rsplit('.', 1)[-1]!r},)."
        )
    if site.kind in ("embedding", "conv"):
        check_place(site.module, site.path)
        if variant.forward_input is not None or variant.group_init is not None:
            why = "rewrites its layer's input" if variant.forward_input is not None else "starts from data"
            raise TargetError(
                f"{site.path}: variant {variant.name!r} {why}, which {article(site.kind)} does not offer; take it out "
                "of target_kinds."
            )
        if site.kind == "embedding" and cfg.dropout:
            raise TargetError(
                f"{site.path}: dropout on the one-hot input of an embedding has no meaning; set dropout=0 or exclude "
                "it."
            )
    if site.kind == "experts":
        check_method(site.path, cfg)
    if site.uncalled:
        raise TargetError(
            f"{site.path} is never called as a module ({site.uncalled}), so an adapter there would do nothing. Add it "
            "to exclude_names."
        )
    paths = structure.aliases.get(id(site.module))
    if paths:
        raise TargetError(
            f"one module has {len(paths)} paths ({listing(paths)}); an adapter on it would act at all of them. Add it "
            "to exclude_names, or give the model two modules."
        )


def layer_set(cfg: AdapterConfig, structure: Structure, sites: list[Place]) -> set[int] | None:
    if cfg.layers is None:
        return None
    there = {s.layer for s in sites if s.layer is not None}
    n = structure.n_layers
    wanted = {i + n if i < 0 else i for i in cfg.layers}
    if not there or wanted - there:
        missing = sorted(wanted - there)
        raise TargetError(
            f"layers: the model has no block {missing or list(cfg.layers)}; it has {n} blocks, 0 to {n - 1}."
            if there
            else "layers: the model has no stack of blocks to count; use target_names."
        )
    return wanted


def block_sites(structure: Structure) -> list[Place]:
    if not structure.blocks or structure.d_model is None:
        raise TargetError(
            "this variant hooks the residual stream after blocks, and the model has no list of blocks such as "
            "model.layers."
        )
    d = structure.d_model
    return [Place(path, module, d, d, index, "block", kind="block") for path, index, module in structure.blocks]


def tails(sites: list[Place]) -> list[str]:
    return list(dict.fromkeys(part for s in sites for part in (s.path.rsplit(".", 1)[-1], s.path)))


def check_place(module: nn.Module, path: str) -> None:
    """Refuse layers whose adapters would compute something else than a changed weight."""
    if isinstance(module, CONVS) and module.groups != 1:
        raise TargetError(
            f"{path}: a convolution with groups={module.groups} is not one matrix; add it to exclude_names."
        )
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        raise TargetError(
            f"{path}: an embedding with max_norm or sparse gradients cannot be adapted; add it to exclude_names."
        )


def article(kind: str) -> str:
    """ "an embedding", "a norm"."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
