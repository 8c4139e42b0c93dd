"""`ll.plan`: what an attach would do, without touching anything."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

from ..core.config import AdapterConfig, matches
from ..core.errors import LoraLiteError, TargetError, did_you_mean, listing
from ..core.registry import get_variant, resolve
from ..core.spec import ParamSpec
from . import weights
from .bank import Bank
from .experts import check_method
from .state import SITE, Target, unwrap
from .structure import Site, Structure, describe
from .virtual import article, check_place
from .whole import only_input_embedding, tied_notes, tied_sites, whole_config, whole_sites


@dataclass
class Plan:
    """The targets of a config on a model, what stays unadapted, and what it costs. Prints as a table."""

    cfg: AdapterConfig
    targets: list[Target]
    hits: dict[str, int]
    """Number of targets that each pattern of the config matches."""
    unadapted: list[tuple[str, str]]
    """(path, reason) of layers and weights that stay as they are."""
    base_params: int
    rows: list[tuple[str, str, int | None, str, bool]] = field(default_factory=list)
    """(class, role, block, storage dtype, quantised) per target."""
    notes: list[str] = field(default_factory=list)
    """What one should know about the targets, such as a weight that is shared with a layer that stays as it is."""

    @property
    def trainable(self) -> int:
        """Number of trained adapter parameters."""
        return sum(math.prod(s.shape) for t in self.targets for s in t.specs.values() if s.is_trained)

    @property
    def params(self) -> int:
        """Number of adapter parameters, frozen factors included."""
        return sum(math.prod(s.shape) for t in self.targets for s in t.specs.values())

    @property
    def bytes(self) -> int:
        """Bytes of all adapter tensors, which is nearly the size of the file."""
        return sum(math.prod(s.shape) * _itemsize(s, self.cfg) for t in self.targets for s in t.specs.values())

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of AdamW's two moments."""
        return 2 * 4 * self.trainable

    def groups(self) -> list[tuple[str, str, int, int, int, str, int]]:
        """(path with `*` for the block index, role, count, d_in, d_out, dtype, parameters) of like targets."""
        table: dict[tuple[str, str, int, int, str], list[int]] = {}
        for t, (_, role, layer, dtype, quantised) in zip(self.targets, self.rows, strict=True):
            path = (
                t.path if layer is None else ".".join("*" if part == str(layer) else part for part in t.path.split("."))
            )
            stored = dtype + (" quantised" if quantised else "") + (f" x {t.experts}" if t.experts else "")
            entry = table.setdefault((path, role, t.d_in, t.d_out, stored), [0, 0])
            entry[0] += 1
            entry[1] += sum(math.prod(s.shape) for s in t.specs.values() if s.is_trained)
        return [
            (path, role, n, d_in, d_out, dtype, params)
            for (path, role, d_in, d_out, dtype), (n, params) in table.items()
        ]

    def keep(self, targets: list[Target]) -> None:
        """Narrow the plan to these targets, whose ranks a calibration may have changed."""
        kept = {t.path: t for t in targets}
        pairs = list(zip(self.targets, self.rows, strict=True))
        self.unadapted += [(t.path, "left out after calibration") for t, _ in pairs if t.path not in kept]
        self.rows = [row for t, row in pairs if t.path in kept]
        self.targets = [kept[t.path] for t, _ in pairs if t.path in kept]

    def __str__(self) -> str:
        lines = [
            f"{self.cfg.variant}: {len(self.targets)} targets, {self.trainable:,} trained of {self.base_params:,} parameters ({self.trainable / max(1, self.base_params):.3%})"
        ]
        rows = [("target", "role", "n", "shape", "dtype", "trained")]
        rows += [
            (path or "(the model)", role, str(n), f"{d_in}->{d_out}", dtype, f"{params:,}")
            for path, role, n, d_in, d_out, dtype, params in self.groups()
        ]
        widths = [max(len(r[i]) for r in rows) for i in range(6)]
        lines += ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"  {pattern}: {n} targets" for pattern, n in self.hits.items()]
        lines += [f"  {note}" for note in self.notes]
        lines.append(f"  adapter {size_text(self.bytes)}, optimiser state {size_text(self.optimizer_bytes)}")
        reasons: dict[str, list[str]] = {}
        for path, why in self.unadapted:
            reasons.setdefault(why, []).append(path)
        lines += [f"  unadapted ({why}): {len(paths)}, such as {listing(paths, 2)}" for why, paths in reasons.items()]
        return "\n".join(lines)

    __repr__ = __str__


def plan(model: nn.Module, cfg: AdapterConfig) -> Plan:
    """What `attach(model, cfg)` would adapt. Touches nothing; shapes suffice, so the model may lie on the meta device.

    Raises:
        ConfigError: a field is wrong for the variant.
        TargetError: a pattern, layer index or the whole config hits nothing, or a hit cannot be adapted.
    """
    model, cfg = unwrap(model), resolve(cfg)
    variant = get_variant(cfg.variant)
    structure = describe(model)
    if variant.site == "block" and cfg.target_kinds != type(cfg)(variant=cfg.variant).target_kinds:
        raise TargetError(
            f"variant {variant.name!r} hooks the residual stream after blocks, so target_kinds={cfg.target_kinds!r} says nothing to it; leave it out."
        )
    sites = (
        _block_sites(structure)
        if variant.site == "block"
        else [s for s in structure.sites if s.kind in cfg.target_kinds]
    )
    if variant.site == "embedding" and cfg.target_names is None:
        sites = only_input_embedding(model, sites)
    hits = _hits(cfg, ("target_names", "exclude_names"), sites, "layers")
    whole = whole_sites(model, structure, cfg, hits)
    beside = {s.path for s in whole}
    chosen, unadapted = select([s for s in sites if s.path not in beside], structure, cfg)
    for site in chosen:
        _check_site(site, structure, cfg)
    if variant.site != "block":
        others = [s for s in structure.sites if s.kind not in (*cfg.target_kinds, "norm") and s.path not in beside]
        unadapted += [(s.path, f"{s.kind}; add it with target_kinds") for s in others]
    hits |= _hits(cfg, None, chosen, "targets")
    targets = [target_of(s, cfg.for_target(s.path, s.role)) for s in chosen]
    if variant.shared_specs is not None:
        add_shared(targets, cfg)
    if variant.tied is not None:
        for owner, site in tied_sites(structure, chosen):
            target = make_target(site.path, site.d_in, site.d_out, variant.tied(targets[owner].cfg), "linear")
            target.tied, target.shared = targets[owner].path, dict.fromkeys(targets[owner].specs, targets[owner].path)
            targets.append(target)
            chosen = [*chosen, site]
    if whole:
        own = whole_config(cfg)
        for site in whole:
            _check_site(site, structure, own)
        targets += [target_of(s, own) for s in whole]
        chosen = chosen + whole
    rows = [
        (
            type(s.module).__name__,
            s.role,
            s.layer,
            _dtype_name(s.module),
            variant.site == "linear" and weights.is_quantised(s.module),
        )
        for s in chosen
    ]
    unadapted += [
        (path, f"bare parameter of shape {'x'.join(map(str, shape))}, not a linear layer")
        for path, shape in structure.raw
    ]
    notes = tied_notes(model, chosen) + _expert_notes(chosen)
    return Plan(cfg, targets, hits, unadapted, sum(_numel(p) for p in _base_parameters(model)), rows, notes)


def _expert_notes(chosen: list[Site]) -> list[str]:
    """What swapped-in weights cost while training."""
    size = sum(s.module.weight.numel() * s.module.weight.element_size() for s in chosen if isinstance(s.module, Bank))
    if not size:
        return []
    return [
        f"fused experts: training keeps their adapted weights ({size_text(size)} over all layers) for the backward pass; with gradient checkpointing those of one layer at a time"
    ]


def _hits(cfg: AdapterConfig, fields: tuple[str, ...] | None, sites: list[Site], what: str) -> dict[str, int]:
    """Pattern -> number of matches, for the named fields or for all others; a pattern without a match raises."""
    names = ("target_names", "exclude_names", "train_modules")
    hits: dict[str, int] = {}
    for name, pattern in cfg.patterns():
        if (name in fields) if fields is not None else (name not in names):
            hits[f"{name} {pattern!r}"] = n = sum(matches(pattern, s.path) for s in sites)
            if n == 0:
                raise TargetError(
                    f"{name}: {pattern!r} matches none of the {len(sites)} {what}.{did_you_mean(pattern, _tails(sites))} ll.plan(model, ll.{type(cfg).__name__}()) shows all of them."
                )
    return hits


def select(sites: list[Site], structure: Structure, cfg: AdapterConfig) -> tuple[list[Site], list[tuple[str, str]]]:
    """The chosen layers, and (path, reason) of the others. Names are filtered first, roles looked at afterwards."""
    wanted_layers = _layer_set(cfg, structure, sites)
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
            f"the config chooses none of the model's {len(sites)} layers ({', '.join(f'{n} {r}' for r, n in why.most_common(3)) or 'none found'}). {cure}"
        )
    return chosen, left


def target_of(site: Site, cfg: AdapterConfig) -> Target:
    """The target on one layer, for a config that `for_target` has been through."""
    cfg = cfg.for_layer(weights.bias_of(site.module) is not None)
    experts = site.module.n_experts if isinstance(site.module, Bank) else 0
    return make_target(site.path, site.d_in, site.d_out, cfg, site.kind, experts)


def make_target(path: str, d_in: int, d_out: int, cfg: AdapterConfig, kind: str = "linear", experts: int = 0) -> Target:
    """The tensors that the variant wants on one layer, checked."""
    variant = get_variant(cfg.variant)
    try:
        specs = variant.param_specs(d_in, d_out, cfg)
    except LoraLiteError as e:
        raise type(e)(f"{path}: {e}") from None
    for short in specs:
        if not short.startswith("lora_") or "@" in short or "." in short:
            raise TargetError(
                f"{variant.name}.param_specs names a tensor {short!r}; names begin with 'lora_' and hold neither '@' nor '.'."
            )
    if experts:
        specs = {k: dataclasses.replace(s, shape=(experts, *s.shape)) for k, s in specs.items()}
    return Target(path, d_in, d_out, cfg, dict(specs), kind, experts)


def add_shared(targets: list[Target], cfg: AdapterConfig) -> None:
    """Give the shared tensors to the first target and point the others to it."""
    shared = get_variant(cfg.variant).shared_specs(targets, cfg)  # type: ignore[misc]
    targets[0].specs.update(shared)
    for t in targets[1:]:
        t.shared = dict.fromkeys(shared, targets[0].path)


def _check_site(site: Site, structure: Structure, cfg: AdapterConfig) -> None:
    variant = get_variant(cfg.variant)
    if site.kind == "norm" and not variant.norms:
        raise TargetError(
            f"{site.path}: variant {variant.name!r} cannot stand on a norm; take it out of target_kinds, or train norms whole: train_modules=({site.path.rsplit('.', 1)[-1]!r},)."
        )
    if site.kind in ("embedding", "conv"):
        check_place(site.module, site.path)
        if variant.forward_input is not None or variant.group_init is not None:
            why = "rewrites its layer's input" if variant.forward_input is not None else "starts from data"
            raise TargetError(
                f"{site.path}: variant {variant.name!r} {why}, which {article(site.kind)} does not offer; take it out of target_kinds."
            )
        if site.kind == "embedding" and cfg.dropout:
            raise TargetError(
                f"{site.path}: dropout on the one-hot input of an embedding has no meaning; set dropout=0 or exclude it."
            )
    if site.kind == "experts":
        check_method(site.path, cfg)
    if site.uncalled:
        raise TargetError(
            f"{site.path} is never called as a module ({site.uncalled}), so an adapter there would do nothing. Add it to exclude_names."
        )
    paths = structure.aliases.get(id(site.module))
    if paths:
        raise TargetError(
            f"one module has {len(paths)} paths ({listing(paths)}); an adapter on it would act at all of them. Add it to exclude_names, or give the model two modules."
        )


def _layer_set(cfg: AdapterConfig, structure: Structure, sites: list[Site]) -> set[int] | None:
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


def _block_sites(structure: Structure) -> list[Site]:
    if not structure.blocks or structure.d_model is None:
        raise TargetError(
            "this variant hooks the residual stream after blocks, and the model has no list of blocks such as model.layers."
        )
    d = structure.d_model
    return [Site(path, module, d, d, index, "block", kind="block") for path, index, module in structure.blocks]


def _tails(sites: list[Site]) -> list[str]:
    return list(dict.fromkeys(part for s in sites for part in (s.path.rsplit(".", 1)[-1], s.path)))


def _base_parameters(model: nn.Module) -> list[torch.Tensor]:
    sites = [m.__dict__[SITE] for m in model.modules() if SITE in m.__dict__]
    adapter = {k for site in sites for slot in site.slots.values() for k in slot.keys.values()}
    found = {  # a tied parameter counts once
        id(p): p
        for m in model.modules()
        for k, p in m._parameters.items()
        if p is not None and not (SITE in m.__dict__ and k in adapter)
    }
    return list(found.values())


def _numel(p: torch.Tensor) -> int:
    """Logical elements: two per byte where bitsandbytes packs four bits."""
    state = getattr(p, "quant_state", None)
    return math.prod(state.shape) if state is not None and getattr(state, "shape", None) is not None else p.numel()


def _itemsize(spec: ParamSpec, cfg: AdapterConfig) -> int:
    return (spec.dtype or cfg.torch_dtype).itemsize


def _dtype_name(module: nn.Module) -> str:
    w = next((p for p in (getattr(module, "weight", None), *module.parameters()) if isinstance(p, torch.Tensor)), None)
    return "?" if w is None else str(w.dtype).removeprefix("torch.")


def size_text(n: int) -> str:
    if n >= 2**30:
        return f"{n / 2**30:.1f} GiB"
    return f"{n / 2**20:.1f} MiB" if n >= 2**20 else f"{n / 2**10:.1f} KiB"
