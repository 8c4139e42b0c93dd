"""`ll.plan`: what an attach would do, without touching anything."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import nn

from ..core.config import AdapterConfig
from ..core.errors import listing, size_text
from ..core.registry import get_variant, resolve
from ..core.spec import ParamSpec
from ..core.variant import Variant
from .layers.kinds import kind_named
from .layers.read import is_quantised
from .model.held import norms_with_figures
from .model.record import Target
from .model.site import base_parameters
from .model.state import unwrap
from .targets.beside import whole_config, whole_places
from .targets.choose import add_shared, check_place, count_hits, make_target, places_of, select, target_of
from .targets.structure import Place, Structure, describe
from .targets.tied import tied_notes, tied_places


@dataclass
class Plan:
    """The targets of a config on a model, what stays unadapted, and what it costs. Prints as a table."""

    cfg: AdapterConfig
    """The config, as its method's own config class."""
    targets: list[Target]
    """One per adapted layer: `path`, `d_in`, `d_out`, `cfg` with the target's own rank, `specs` of its tensors."""
    hits: dict[str, int]
    """Number of targets that each pattern of the config matches."""
    unadapted: list[tuple[str, str]]
    """(path, reason) of layers and weights that stay as they are."""
    base_params: int
    """Number of parameters of the model, shared ones counted once."""
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
            f"{self.cfg.variant}: {len(self.targets)} targets, {self.trainable:,} trained of {self.base_params:,} "
            f"parameters ({self.trainable / max(1, self.base_params):.3%})"
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
    places = places_of(structure, variant, cfg)
    if cfg.target_names is None:
        places = kind_named(variant.site).narrow(model, places)
    others = () if kind_named(variant.site).apart else structure.places
    hits = count_hits(cfg, ("target_names", "exclude_names"), places, "layers", others)
    whole = whole_places(model, structure, cfg, hits)
    beside = {s.path for s in whole}
    chosen, unadapted = select([s for s in places if s.path not in beside], cfg)
    for place in chosen:
        check_place(place, structure, cfg)
    hits |= count_hits(cfg, None, chosen, "targets")
    targets = [target_of(s, cfg.for_target(s.path, s.role)) for s in chosen]
    if variant.shared_specs is not None:
        add_shared(targets, cfg)
    if variant.tied is not None:
        tied, more = tied_targets(structure, chosen, targets)
        chosen, targets = chosen + tied, targets + more
    if whole:
        own = whole_config(cfg)
        for place in whole:
            check_place(place, structure, own)
        chosen, targets = chosen + whole, targets + [target_of(s, own) for s in whole]
    unadapted += _not_offered(structure, variant, cfg, beside)
    base = {id(p): p for _, p in base_parameters(model)}  # a tied parameter counts once
    rows = [_row(place, variant) for place in chosen]
    notes = (
        tied_notes(model, chosen)
        + _kind_notes(variant, chosen)
        + _weight_notes(variant, targets)
        + _start_note(targets, cfg)
    )
    notes += _held_notes(model) + _ignored(variant, cfg)
    made = Plan(cfg, targets, hits, unadapted, sum(map(_numel, base.values())), rows, notes)
    if made.trainable > made.base_params:
        notes.append(f"more is trained than the base has: a rank of {cfg.r} is above the width of its layers")
    return made


def _ignored(variant: type[Variant], cfg: AdapterConfig) -> list[str]:
    """What was set and has no effect with this method."""
    plain = variant.config(variant=variant.name)
    set_ = [name for name in variant.ignores if getattr(cfg, name) != getattr(plain, name)]
    return [f"{name}={getattr(cfg, name)} has no effect: {variant.name} does not use it" for name in set_]


def tied_targets(structure: Structure, chosen: list[Place], targets: list[Target]) -> tuple[list[Place], list[Target]]:
    """The layers that share a chosen one's weight, and the targets on them, on which its tensors act too."""
    places, more = [], []
    for i, place in tied_places(structure, chosen):
        owner = targets[i]
        cfg = owner.variant.tied(owner.cfg)  # type: ignore[misc]
        target = make_target(place.path, place.d_in, place.d_out, cfg, place.kind)
        target.tied, target.shared = owner.path, dict.fromkeys(owner.specs, owner.path)
        places.append(place)
        more.append(target)
    return places, more


def _not_offered(
    structure: Structure, variant: type[Variant], cfg: AdapterConfig, beside: set[str]
) -> list[tuple[str, str]]:
    """(path, reason) of the layers of other kinds and of bare parameters."""
    others = [s for s in structure.places if s.kind not in cfg.target_kinds and kind_named(s.kind).offered]
    left = []
    if not kind_named(variant.site).apart:
        left = [(s.path, f"{s.kind}; add it with target_kinds") for s in others if s.path not in beside]
    return left + [
        (path, f"bare parameter of shape {'x'.join(map(str, shape))}, not a linear layer")
        for path, shape in structure.raw
    ]


def _row(place: Place, variant: type[Variant]) -> tuple[str, str, int | None, str, bool]:
    """What the table says of a target beyond its shape."""
    quantised = not kind_named(variant.site).apart and is_quantised(place.module)
    return type(place.module).__name__, place.role, place.layer, _dtype_name(place.module), quantised


def _kind_notes(variant: type[Variant], chosen: list[Place]) -> list[str]:
    """What the kinds of the chosen layers have to say."""
    by_kind: dict[str, list[nn.Module]] = {}
    for place in chosen:
        by_kind.setdefault(place.kind, []).append(place.module)
    return [note for name, modules in by_kind.items() for note in kind_named(name).notes(modules, variant)]


def _held_notes(model: nn.Module) -> list[str]:
    """What becomes of running figures."""
    paths = [path for path, _ in norms_with_figures(model)]
    if not paths:
        return []
    return [
        f"running figures of {len(paths)} norms, such as {paths[0]}, are held while an adapter is attached; training "
        "normalises by the batch, evaluation by the base's figures"
    ]


def _weight_notes(variant: type[Variant], targets: list[Target]) -> list[str]:
    """What a method that adapts the weight itself builds in every call."""
    if variant.weight is None:
        return []
    sizes = [4 * t.d_in * t.d_out * max(1, t.experts) for t in targets if t.variant is variant]
    return [
        f"each layer's adapted weight is built in every call (up to {size_text(max(sizes))} in fp32); training keeps "
        f"them ({size_text(sum(sizes))} over all layers) for the backward pass, with gradient checkpointing those of "
        "one block at a time, and a model that generates with a cache keeps them in the output's dtype"
    ]


def _start_note(targets: list[Target], cfg: AdapterConfig) -> list[str]:
    """What a start that takes long says of itself."""
    note = cfg.start_note([(t.d_in, t.d_out) for t in targets if t.variant.name == cfg.variant])
    return [] if note is None else [note]


def _numel(p: torch.Tensor) -> int:
    """Logical elements: two per byte where bitsandbytes packs four bits."""
    state = getattr(p, "quant_state", None)
    return math.prod(state.shape) if state is not None and getattr(state, "shape", None) is not None else p.numel()


def _itemsize(spec: ParamSpec, cfg: AdapterConfig) -> int:
    return (spec.dtype or cfg.torch_dtype).itemsize


def _dtype_name(module: nn.Module) -> str:
    tensors = chain((getattr(module, "weight", None),), module.parameters())
    w = next((p for p in tensors if isinstance(p, torch.Tensor)), None)
    return "?" if w is None else str(w.dtype).removeprefix("torch.")
