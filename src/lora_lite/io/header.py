"""The header of an adapter file: plain JSON, everything `load` needs."""

from __future__ import annotations

import dataclasses
import os
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._version import __version__
from ..core.config import AdapterConfig
from ..core.errors import FileError, LoraLiteWarning, did_you_mean, listing, shown
from ..core.files import opened, parsed, reading
from ..core.registry import get_variant
from ..runtime.layers.kinds import DEFAULT_KIND, KINDS, kind_named
from ..runtime.model.kind import Kind
from ..runtime.model.record import Record, Target
from ..runtime.targets.choose import add_shared, make_target
from ..runtime.targets.structure import describe
from .tensors import checksum

FORMAT = 1


BESIDE = "target_variants"
"""What a file requires of its reader when some targets have another method than the adapter's own."""


MAX_HEADER = 64 << 20
MAX_PATTERNS = 1 << 13
"""In one field of a config."""
MAX_SCALE = 1e6
"""Of alpha / r in a file: such a factor, and such a sum, float32 can still hold."""


def header(record: Record, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The file's header for these tensors: plain JSON, everything `load` needs."""
    cfg, variants = record.cfg.to_dict(), set[str]()
    targets = {}
    for t in record.targets.values():
        defaults = cfg if t.cfg.variant == record.cfg.variant else type(t.cfg)(variant=t.cfg.variant).to_dict()
        variants.add(t.cfg.variant)
        own = {k: v for k, v in t.cfg.to_dict().items() if v != defaults[k]}
        entry: dict[str, Any] = {"d_in": t.d_in, "d_out": t.d_out, "r": t.cfg.r, "scale": t.cfg.scale, "base": t.base}
        beside = {"variant": t.cfg.variant} if defaults is not cfg else {}
        kind = {"kind": t.kind} if t.kind != DEFAULT_KIND else {}
        kind |= {"experts": t.experts} if t.experts else {}
        together = {"tied": t.tied} if t.tied else {}
        together |= {"shared": t.shared} if t.shared and not t.tied else {}
        sums = {"crc32": {short: checksum(tensors[t.key(short)]) for short in t.specs}} if t.specs else {}
        targets[t.path] = entry | ({"config": own} if own else {}) | kind | beside | together | sums
    return {
        "format": FORMAT,
        "version": __version__,
        "requires": [BESIDE] if len(variants) > 1 else [],
        "config": cfg,
        "targets": targets,
        "steps": record.steps,
        "total_steps": record.total_steps,
    }


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of an adapter file, checked to be ours; reads no tensor."""
    path = Path(path)
    with reading(path):
        _check_size(path)
    with opened(path) as f:
        meta = f.metadata() or {}
    if "lora_lite" not in meta:
        raise FileError(
            f"{path} is a safetensors file without a lora_lite header. For PEFT adapters pass the folder that holds "
            "adapter_config.json."
        )
    head = parsed(meta["lora_lite"], f"{path}: the header")
    _check_format(head, path)
    if not isinstance(head.get("config"), dict) or not isinstance(head.get("targets"), dict) or not head["targets"]:
        raise FileError(f"{path}: the header has no config or no targets.")
    return head


def _check_size(path: Path) -> None:
    """Raise before a reader believes what a file claims of its own header."""
    if not path.is_file():
        raise FileError(f"{path} {'is no file' if path.exists() else 'does not exist'}.")
    with path.open("rb") as f:
        head_size = f.read(8)
    if len(head_size) == 8 and struct.unpack("<Q", head_size)[0] > MAX_HEADER:
        raise FileError(
            f"{path} is not a safetensors file (its header claims {struct.unpack('<Q', head_size)[0]} bytes). "
            "lora_lite reads no pickles: .bin, .pt and .pkl are refused."
        )


def _check_format(head: Any, path: Path) -> None:
    if not isinstance(head, dict) or not _is_count(head.get("format")) or head["format"] == 0:
        raise FileError(f"{path}: the header names no format number.")
    required = head.get("requires") or []
    if head["format"] > FORMAT or required not in ([], [BESIDE]):
        version = shown(head.get("version"))
        raise FileError(
            f"{path} was written by lora_lite {version} and needs a newer version than {__version__} "
            f"(format {head['format']}, requires {shown(required)})."
        )


def config_from_header(head: dict[str, Any], where: str) -> AdapterConfig:
    """The config of a file; unknown optional keys warn, since a newer version may have written them."""
    _check_patterns(head["config"], where)
    unknown: list[str] = []
    with reading(where, "the config"):
        variant = get_variant(str(head["config"].get("variant")))
        cfg = variant.config.from_dict(head["config"], unknown)
        check_scale(cfg.scale, "the config")
    if unknown:
        warnings.warn(
            f"{where}: ignored config keys of a newer version: {listing(unknown)}", LoraLiteWarning, stacklevel=3
        )
    return cfg


def record_from_header(model: nn.Module, head: dict[str, Any], name: str, where: str) -> Record:
    """The adapter that a header describes, checked against the model's modules. Runs no pattern of the file."""
    cfg, entries = config_from_header(head, where), head["targets"]
    modules = _modules(model, entries)
    widths = _widths(model, cfg)
    targets: dict[str, Target] = {}
    for path, entry in entries.items():
        if path not in modules:
            raise FileError(
                f"{where}: the model has no module {path!r}.{did_you_mean(path, modules)} The adapter belongs to "
                "another architecture or to a model with another prefix."
            )
        with reading(where, f"the entry of target {path!r}"):
            targets[path] = _target(path, entry, modules[path], cfg, widths)
    with reading(where, "what the targets share"):
        _tie(targets, entries)
        _share([targets[path] for path in modules if path in targets], cfg, entries)  # in the order of attach
    steps, total = (head.get(k, 0) for k in ("steps", "total_steps"))
    if not (_is_count(steps) and _is_count(total)):
        raise FileError(f"{where}: steps and total_steps must be counts, got {shown(steps)} and {shown(total)}.")
    return Record(name, get_variant(cfg.variant), cfg, targets, steps=steps, total_steps=total)


def _modules(model: nn.Module, entries: dict[str, Any]) -> dict[str, nn.Module]:
    """Path -> module, with the layers that are no modules of a bare model, as banks of experts, where the file adapts
    some."""
    modules = dict(model.named_modules())
    absent = {e.get("kind") for path, e in entries.items() if isinstance(e, dict) and path not in modules}
    for kind in (kind for name, kind in KINDS.items() if name in absent):
        modules |= dict(kind.find(model, describe(model).d_model))
    return modules


Size = tuple[int, int]
"""(d_in, d_out)."""


def _widths(model: nn.Module, cfg: AdapterConfig) -> dict[str, Size]:
    """Path -> size of each block or module, for a method that stands on what is as wide as the stream."""
    kind = kind_named(get_variant(cfg.variant).site)
    if not (kind.stream or kind.named):
        return {}
    structure = describe(model)
    if kind.named:
        return {place.path: (place.d_in, place.d_out) for place in structure.composite}
    return {block.path: (block.width or 0, block.width or 0) for block in structure.streams}


def _target(path: str, entry: dict[str, Any], module: nn.Module, cfg: AdapterConfig, widths: dict[str, Size]) -> Target:
    """One target of a file, whose shape and scale are those of the model and of the config."""
    variant = get_variant(cfg.variant)
    method = get_variant(entry["variant"]) if "variant" in entry else variant
    kind = kind_named(str(entry.get("kind", DEFAULT_KIND)))
    found = widths.get(path) if kind.stream or kind.named else kind.size(module)
    d_in, d_out, experts = _size(path, entry, kind, module, found)
    defaults = cfg if method is variant else method.config(variant=method.name)
    known = {f.name for f in dataclasses.fields(defaults)}
    changes = {k: v for k, v in entry.get("config", {}).items() if k in known}
    _check_patterns(changes, path)
    own = method.config.from_dict({**defaults.to_dict(), **changes}) if changes else defaults
    check_scale(own.scale, path)
    if not abs(float(entry.get("scale", own.scale)) - own.scale) <= 1e-6 * abs(own.scale):
        raise FileError(
            f"{path} was saved with scale {entry['scale']}, and its config makes {own.scale} of it: the config was "
            "edited."
        )
    return make_target(path, d_in, d_out, own, kind.name, experts)


def _size(path: str, entry: dict[str, Any], kind: Kind, module: nn.Module, found: Size | None) -> tuple[int, int, int]:
    """(d_in, d_out, number of experts), the same in the file and in the model."""
    d_in, d_out = entry["d_in"], entry["d_out"]
    if found is None:
        raise FileError(f"{path} is no {kind.name} layer in this model.")
    if found != (d_in, d_out):
        raise FileError(f"{path} is {found[0]}->{found[1]} in this model and {d_in}->{d_out} in the file.")
    experts = kind.copies(module)
    if entry.get("experts", 0) != experts:
        raise FileError(f"{path} holds {experts} experts in this model and {entry.get('experts', 0)} in the file.")
    return d_in, d_out, experts


def _tie(targets: dict[str, Target], entries: dict[str, Any]) -> None:
    """Point targets that share a weight to the one whose tensors act there too."""
    for path, target in targets.items():
        owner = entries[path].get("tied")
        if owner is None:
            continue
        known = isinstance(owner, str) and owner in targets and owner != path
        if not known or targets[owner].variant.tied is None:
            raise FileError(f"{path} is tied to {owner!r}, which is no such target of the file.")
        target.tied, target.shared = owner, dict.fromkeys(targets[owner].specs, owner)


def _share(targets: list[Target], cfg: AdapterConfig, entries: dict[str, Any]) -> None:
    """Give each shared tensor to the target that owns it in the file. Where the file does not say, as before version
    0.2, that is the first."""
    own = [t for t in targets if t.cfg.variant == cfg.variant and not t.tied]
    claimed = {t.path: entries[t.path]["shared"] for t in own if "shared" in entries[t.path]}

    def owner_of(group: list[Target], short: str) -> Target:
        named = [claimed[t.path].get(short) for t in group if t.path in claimed]
        return next((t for t in group if t.path in named), group[0])

    if own and get_variant(cfg.variant).shared_specs is not None:
        add_shared(own, cfg, owner_of)
    for t in own:
        if claimed.get(t.path, t.shared) != t.shared:
            raise FileError(
                f"{t.path} shares {claimed[t.path]!r} (tensor: owner) in the file, and variant {cfg.variant!r} shares "
                f"{t.shared!r} in this model: an owner must be a target of the file that owns that tensor."
            )


def _check_patterns(config: dict[str, Any], where: str) -> None:
    """Raise where a config holds more patterns than are quickly looked at; a model has fewer layers."""
    n = max((len(v) for v in config.values() if isinstance(v, (dict, list))), default=0)
    if n > MAX_PATTERNS:
        raise FileError(
            f"{where}: a field of the config has {n} entries; at most {MAX_PATTERNS} are taken from a file."
        )


def check_scale(scale: float, whose: str) -> None:
    """Raise where a file scales its update beyond anything that was ever trained."""
    if not abs(scale) <= MAX_SCALE:
        raise FileError(f"{whose} scales its update by {scale:g}; at most {MAX_SCALE:g} is taken from a file.")


def saved_sums(head: dict[str, Any], record: Record) -> dict[str, Any]:
    """Key -> checksum of the tensors of a file; those of versions before 0.2 hold none."""
    found: dict[str, Any] = {}
    for t in record.targets.values():
        sums = head["targets"][t.path].get("crc32") or {}
        found |= {t.key(short): sums[short] for short in t.specs if short in sums}
    return found


def check_sums(head: dict[str, Any], record: Record, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise where a tensor is not what was saved."""
    sums = saved_sums(head, record)
    for key in sums:
        check_sum(key, tensors[key], sums, where)


def check_sum(key: str, t: Tensor, sums: Mapping[str, Any], where: str) -> None:
    """Raise where this tensor is not what was saved."""
    if key in sums and sums[key] != checksum(t):
        raise FileError(
            f"{where}: the numbers of {key} are not those that were saved (their checksum differs): the file is "
            "damaged. Copy or download it again."
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62
