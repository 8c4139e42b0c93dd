"""The header of an adapter file: plain JSON, everything `load` needs."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from .._version import __version__
from ..core.config import AdapterConfig
from ..core.errors import FileError, LoraLiteError, LoraLiteWarning, did_you_mean
from ..core.files import opened
from ..core.registry import get_variant
from ..runtime.layers.bank import banks
from ..runtime.layers.kinds import extent
from ..runtime.model.record import Record, Target
from ..runtime.targets.choose import add_shared, make_target
from ..runtime.targets.structure import describe

FORMAT = 1


BESIDE = "target_variants"
"""What a file requires of its reader when some targets have another method than the adapter's own."""


MAX_HEADER = 64 << 20


def header(record: Record) -> dict[str, Any]:
    """The file's header: plain JSON, everything `load` needs."""
    cfg, variants = record.cfg.to_dict(), set[str]()
    targets = {}
    for t in record.targets.values():
        defaults = cfg if t.cfg.variant == record.cfg.variant else type(t.cfg)(variant=t.cfg.variant).to_dict()
        variants.add(t.cfg.variant)
        own = {k: v for k, v in t.cfg.to_dict().items() if v != defaults[k]}
        entry: dict[str, Any] = {"d_in": t.d_in, "d_out": t.d_out, "r": t.cfg.r, "scale": t.cfg.scale, "base": t.base}
        beside = {"variant": t.cfg.variant} if defaults is not cfg else {}
        kind = {"kind": t.kind} if t.kind != "linear" else {}
        kind |= {"experts": t.experts} if t.experts else {}
        tied = {"tied": t.tied} if t.tied else {}
        targets[t.path] = entry | ({"config": own} if own else {}) | kind | beside | tied
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
    if not path.is_file():
        raise FileError(f"{path} does not exist.")
    with path.open("rb") as f:
        head_size = f.read(8)
    if len(head_size) == 8 and struct.unpack("<Q", head_size)[0] > MAX_HEADER:
        raise FileError(
            f"{path} is not a safetensors file (its header claims {struct.unpack('<Q', head_size)[0]} bytes). "
            "lora_lite reads no pickles: .bin, .pt and .pkl are refused."
        )
    with opened(path) as f:
        meta = f.metadata() or {}
    if "lora_lite" not in meta:
        raise FileError(
            f"{path} is a safetensors file without a lora_lite header. For PEFT adapters pass the folder that holds "
            "adapter_config.json."
        )
    try:
        head = json.loads(meta["lora_lite"])
    except (json.JSONDecodeError, RecursionError) as e:
        raise FileError(f"{path}: the header is not JSON ({e}).") from None
    if not isinstance(head, dict) or not _count(head.get("format")) or head["format"] == 0:
        raise FileError(f"{path}: the header names no format number.")
    required = head.get("requires") or []
    if head["format"] > FORMAT or required not in ([], [BESIDE]):
        raise FileError(
            f"{path} was written by lora_lite {head.get('version')} and needs a newer version than {__version__} "
            f"(format {head['format']}, requires {required})."
        )
    if not isinstance(head.get("config"), dict) or not isinstance(head.get("targets"), dict) or not head["targets"]:
        raise FileError(f"{path}: the header has no config or no targets.")
    return head


def config_from_header(head: dict[str, Any], where: str) -> AdapterConfig:
    """The config of a file; unknown optional keys warn, since a newer version may have written them."""
    try:
        variant = get_variant(str(head["config"].get("variant")))
        unknown: list[str] = []
        cfg = variant.config.from_dict(head["config"], unknown)
    except LoraLiteError as e:
        raise FileError(f"{where}: {e}") from None
    except (TypeError, ValueError, OverflowError) as e:
        raise FileError(f"{where}: the config is malformed ({e}).") from None
    if unknown:
        warnings.warn(
            f"{where}: ignored config keys of a newer version: {', '.join(unknown)}", LoraLiteWarning, stacklevel=3
        )
    return cfg


def record_from_header(model: nn.Module, head: dict[str, Any], name: str, where: str) -> Record:
    """The adapter that a header describes, checked against the model's modules. Runs no pattern of the file."""
    cfg = config_from_header(head, where)
    variant = get_variant(cfg.variant)
    modules = dict(model.named_modules())
    if any(isinstance(e, dict) and e.get("kind") == "experts" for e in head["targets"].values()):
        modules |= banks(model, describe(model).d_model)
    widths: dict[str, tuple[str, int, int]] = {}
    if variant.site == "block":
        structure = describe(model)
        d = structure.d_model or 0
        widths = {path: ("block", d, d) for path, _, _ in structure.blocks}
    targets: dict[str, Target] = {}
    for path, entry in head["targets"].items():
        if path not in modules:
            raise FileError(
                f"{where}: the model has no module {path!r}.{did_you_mean(path, modules)} The adapter belongs to "
                "another architecture or to a model with another prefix."
            )
        try:
            method = get_variant(entry["variant"]) if "variant" in entry else variant
            found = widths.get(path) if method.site == "block" else extent(modules[path])
            experts = getattr(modules[path], "n_experts", 0) if found is not None and found[0] == "experts" else 0
            kind, d_in, d_out = str(entry.get("kind", "linear")), entry["d_in"], entry["d_out"]
            if found is None or found[0] != kind:
                raise FileError(f"{path} is no {kind} layer in this model.")
            if found[1:] != (d_in, d_out):
                raise FileError(f"{path} is {found[1]}->{found[2]} in this model and {d_in}->{d_out} in the file.")
            defaults = cfg if method is variant else method.config(variant=method.name)
            known = {f.name for f in dataclasses.fields(defaults)}
            changes = {k: v for k, v in entry.get("config", {}).items() if k in known}
            own = method.config.from_dict({**defaults.to_dict(), **changes})
            if entry.get("experts", 0) != experts:
                raise FileError(
                    f"{path} holds {experts} experts in this model and {entry.get('experts', 0)} in the file."
                )
            target = make_target(path, d_in, d_out, own, kind, experts)
            if abs(float(entry.get("scale", own.scale)) - own.scale) > 1e-6 * abs(own.scale):
                raise FileError(
                    f"{path} was saved with scale {entry['scale']}, and its config makes {own.scale} of it: the "
                    "config was edited."
                )
        except LoraLiteError as e:
            raise FileError(f"{where}: {e}") from None
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
            raise FileError(f"{where}: the entry of target {path!r} is malformed ({e!r}).") from None
        targets[path] = target
    for path, target in targets.items():
        owner = head["targets"][path].get("tied")
        if owner is not None:
            if (
                not isinstance(owner, str)
                or owner not in targets
                or owner == path
                or targets[owner].variant.tied is None
            ):
                raise FileError(f"{where}: {path} is tied to {owner!r}, which is no such target of the file.")
            target.tied, target.shared = owner, dict.fromkeys(targets[owner].specs, owner)
    if variant.shared_specs is not None:
        add_shared([t for t in targets.values() if t.cfg.variant == cfg.variant], cfg)
    steps, total = (head.get(k, 0) for k in ("steps", "total_steps"))
    if not (_count(steps) and _count(total)):
        raise FileError(f"{where}: steps and total_steps must be counts, got {steps!r} and {total!r}.")
    return Record(name, variant, cfg, targets, steps=steps, total_steps=total)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62
