"""The adapter file: one safetensors file whose keys are full state_dict paths and whose header is plain JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._version import __version__
from ..core.config import AdapterConfig
from ..core.errors import (
    BaseMismatchError,
    FileError,
    LoraLiteError,
    LoraLiteWarning,
    StateError,
    did_you_mean,
    listing,
)
from ..core.registry import get_variant
from ..runtime.attach import check_attachable, commit
from ..runtime.bank import banks
from ..runtime.compact import compacted
from ..runtime.handle import Adapter
from ..runtime.plan import add_shared, make_target
from ..runtime.staging import StagedTarget, modules_of, stage
from ..runtime.state import DEFAULT, Record, Target, owned_tensors, record_of, state_of, unwrap
from ..runtime.structure import describe
from ..runtime.weights import extent, fingerprint, is_sharded
from .gather import full_tensor

FORMAT = 1
BESIDE = "target_variants"
"""What a file requires of its reader when some targets have another method than the adapter's own."""
MAX_HEADER = 64 << 20
BaseCheck = Literal["error", "warn", "ignore"]


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    dtype: torch.dtype | None = None,
    compact: bool = True,
) -> Path:
    """Write one adapter to a safetensors file.

    Args:
        path: the file; `.safetensors` is appended when it has no suffix.
        name: which adapter; None means the only one.
        dtype: storage of floating tensors in the file; None keeps theirs.
        compact: after the end of a rank schedule, leave out what was pruned; False keeps it, for a checkpoint that is loaded into the same adapter.

    Returns:
        The path written. It is written beside its place, read back, compared, and renamed, so an old file survives a crash.

    Raises:
        StateError: the model is merged; a scheduled method was trained without its schedule; a trainable tensor would not be saved.
    """
    model = unwrap(model)
    record, state = record_of(model, name), state_of(model)
    if state.merged is not None:
        raise StateError(
            "the model is merged; call ll.unmerge(model) before ll.save, or save the merged model itself with its own save_pretrained."
        )
    if record.variant.on_step is not None and not record.scheduled and record.train_calls > 0:
        raise StateError(
            f"adapter {record.name!r} was trained without its schedule; call ll.schedule(model, optimizer, total_steps) before training."
        )
    _check_strangers(model)
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{path} is a folder; give a file name such as {path / 'adapter.safetensors'}.")
    if not path.suffix:
        path = path.with_suffix(".safetensors")
    tensors = adapter_state_dict(model, record.name)
    if compact and record.variant.compact is not None and 0 < record.total_steps <= record.steps:
        record, tensors = compacted(model, record, tensors)
    if dtype is not None:
        tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
    bad = [k for k, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise StateError(
            f"adapter {record.name!r} has values that are not finite: {listing(bad)}. Training diverged; nothing was written."
        )
    _write(path, tensors, {"lora_lite": json.dumps(header(record), sort_keys=True)})
    return path


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = DEFAULT,
    trainable: bool = False,
    base_check: BaseCheck = "error",
) -> Adapter:
    """Attach an adapter from a file and make it the active one. Needs neither an SVD nor calibration data.

    Args:
        path: a file written by `save`, or a folder in PEFT's layout.
        name: the adapter's name in this model.
        trainable: go on training it.
        base_check: what to do when the base weights are not those the adapter was trained on.

    Raises:
        FileError: damaged, of another format, or with missing, unexpected or ill-shaped tensors. BaseMismatchError: other base weights.
        StateError: the name is taken or the model is merged. In each case the model is untouched.
    """
    if base_check not in ("error", "warn", "ignore"):
        raise FileError(f"base_check must be 'error', 'warn' or 'ignore', got {base_check!r}.")
    check_attachable(model, name)
    model = unwrap(model)
    if Path(path).is_dir():
        from .peft import load_peft

        return load_peft(model, path, name, trainable)
    head = read_header(path)
    record = record_from_header(model, head, name, str(path))
    with safe_open(str(path), "pt") as f:  # nothing is read that would not be used
        _check_names(_expected(record), f.keys(), str(path))
    head, tensors = read(path)
    return _install(model, record, head, tensors, trainable, base_check, str(path))


def adapter_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Full `state_dict` path (without the adapter's name) -> CPU copy of everything the adapter owns, gathered from shards.

    Which tensors those are is decided by ownership, never by their names.
    """
    record = record_of(model, name)
    found: dict[str, Tensor] = {}
    for target, short, _, tensor in owned_tensors(model, record):
        whole = full_tensor(tensor).detach()
        if tuple(whole.shape) != target.specs[short].shape:
            raise StateError(
                f"{target.path}.{short} has shape {tuple(whole.shape)} where {target.specs[short].shape} is expected: sharded training left an incomplete tensor; nothing was saved."
            )
        if whole.is_meta:
            raise StateError(
                f"{target.path}.{short} is on the meta device and has no values; nothing was saved. Load the model's weights first, then attach."
            )
        found[_key(target, short)] = whole.to("cpu", copy=True).contiguous()
    return found


def load_adapter_state_dict(model: nn.Module, name: str | None, state: dict[str, Tensor]) -> None:
    """Copy tensors of `adapter_state_dict` into an attached adapter, in place; compiled code stays valid.

    Raises:
        FileError: keys or shapes do not agree exactly; nothing is copied then.
    """
    record = record_of(model, name)
    own = {_key(target, short): tensor for target, short, _, tensor in owned_tensors(model, record)}
    _check_keys(own, state, "the state dict")
    if any(is_sharded(t) for t in own.values()):
        raise StateError("the model is sharded; load the adapter before sharding, or use torch's set_model_state_dict.")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])


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
    try:
        with path.open("rb") as f:
            (size,) = struct.unpack("<Q", f.read(8))
        if size > MAX_HEADER:
            raise FileError(
                f"{path} is not a safetensors file (its header claims {size} bytes). lora_lite reads no pickles: .bin, .pt and .pkl are refused."
            )
        with safe_open(str(path), "pt") as f:
            meta = f.metadata() or {}
    except (SafetensorError, struct.error) as e:
        raise FileError(
            f"{path} is not a readable safetensors file ({e}). lora_lite reads no pickles: .bin, .pt and .pkl are refused."
        ) from None
    if "lora_lite" not in meta:
        raise FileError(
            f"{path} is a safetensors file without a lora_lite header. For PEFT adapters pass the folder that holds adapter_config.json."
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
            f"{path} was written by lora_lite {head.get('version')} and needs a newer version than {__version__} (format {head['format']}, requires {required})."
        )
    if not isinstance(head.get("config"), dict) or not isinstance(head.get("targets"), dict) or not head["targets"]:
        raise FileError(f"{path}: the header has no config or no targets.")
    return head


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of an adapter file."""
    head = read_header(path)
    try:
        with safe_open(str(path), "pt") as f:
            tensors = {key: f.get_tensor(key) for key in f.keys()}
    except SafetensorError as e:
        raise FileError(f"{path} is damaged ({e}).") from None
    bad = [k for k, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t.float()).all())]
    if bad:
        raise FileError(f"{path} holds values that are not finite: {listing(bad)}.")
    return head, tensors


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
                f"{where}: the model has no module {path!r}.{did_you_mean(path, modules)} The adapter belongs to another architecture or to a model with another prefix."
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
                    f"{path} was saved with scale {entry['scale']}, and its config makes {own.scale} of it: the config was edited."
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


def _install(
    model: nn.Module,
    record: Record,
    head: dict[str, Any],
    tensors: dict[str, Tensor],
    trainable: bool,
    base_check: str,
    where: str,
) -> Adapter:
    _check_keys(_expected(record), tensors, where)
    if base_check != "ignore":
        _check_base(model, record, head, base_check, where)
    staged: list[StagedTarget] = stage(model, record, fill=False)
    with torch.no_grad():
        for view in staged:
            for short, t in view.tensors.items():
                if t.is_meta:
                    raise StateError(f"{view.path} lies on the meta device; load the base weights before the adapter.")
                t.copy_(tensors[_key(view.target, short)])
    return commit(model, record, staged, trainable)


def _expected(record: Record) -> dict[str, Any]:
    """Key -> spec of every tensor that the adapter owns."""
    return {_key(t, short): spec for t in record.targets.values() for short, spec in t.specs.items()}


def _check_names(expected: Iterable[str], got: Iterable[str], where: str) -> None:
    expected, got = dict.fromkeys(expected), dict.fromkeys(got)
    missing, extra = [k for k in expected if k not in got], [k for k in got if k not in expected]
    if missing or extra:
        hint = did_you_mean(missing[0], extra) if missing and extra else ""
        parts = [f"{len(missing)} tensors are missing: {listing(missing)}."] * bool(missing) + [
            f"{len(extra)} are unexpected: {listing(extra)}."
        ] * bool(extra)
        raise FileError(f"{where}: {' '.join(parts)}{hint}")


def _check_keys(expected: dict[str, Any], got: dict[str, Tensor], where: str) -> None:
    _check_names(expected, got, where)
    for key, want in expected.items():
        if tuple(want.shape) != tuple(got[key].shape):
            raise FileError(f"{where}: {key} has shape {tuple(got[key].shape)}, expected {tuple(want.shape)}.")
        dtype = want.dtype or torch.float32
        if got[key].dtype != dtype and not (dtype.is_floating_point and got[key].is_floating_point()):
            raise FileError(f"{where}: {key} holds {got[key].dtype}, expected {dtype}.")


def _check_base(model: nn.Module, record: Record, head: dict[str, Any], base_check: str, where: str) -> None:
    """Compare each target's fingerprint with the file's, within the coarser dtype's rounding; quantised bases only warn."""
    modules = modules_of(model, record.targets.values())
    for target in record.targets.values():
        old = head["targets"][target.path].get("base")
        if target.kind == "block" or not isinstance(old, dict) or not isinstance(old.get("sample"), list):
            continue
        new = fingerprint(modules[target.path])
        if not new:
            continue
        if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in old["sample"]):
            raise FileError(f"{where}: the fingerprint of {target.path} is malformed.")
        a, b = torch.tensor(old["sample"], dtype=torch.float64), torch.tensor(new["sample"], dtype=torch.float64)
        rounding = max(
            {"bfloat16": 2**-7, "float16": 2**-9}.get(str(d), 2**-18) for d in (old.get("dtype"), new["dtype"])
        )
        quantised = bool(old.get("quantised")) or bool(new["quantised"])
        error = float((a - b).norm() / a.norm().clamp_min(1e-30)) if a.shape == b.shape else float("inf")
        if error <= (0.5 if quantised else rounding):
            if quantised and error > rounding:
                warnings.warn(
                    f"{where}: the base of {target.path} is quantised differently (sampled weights differ by {error:.1%}); outputs will differ slightly.",
                    LoraLiteWarning,
                    stacklevel=4,
                )
                return
            continue
        text = f"{where}: the adapter was trained on other base weights: at {target.path} sampled weights differ by {error:.1%}. Load the base it was trained on, or pass base_check='warn' if you mean it."
        if base_check == "error":
            raise BaseMismatchError(text)
        warnings.warn(text, LoraLiteWarning, stacklevel=4)
        return


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _check_strangers(model: nn.Module) -> None:
    """Raise when something is trainable that no adapter file would hold."""
    own = {id(t) for r in state_of(model).records.values() for _, _, _, t in owned_tensors(model, r)}
    strangers = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if strangers:
        raise StateError(
            f"{len(strangers)} trainable parameters belong to no adapter and would not be saved: {listing(strangers)}. Freeze them (requires_grad_(False)), or save them yourself first."
        )


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(fd)
    try:
        save_file(tensors, temp, metadata)
        with safe_open(temp, "pt") as f:
            if (
                set(f.keys()) != set(tensors)
                or f.metadata() != metadata
                or any(not torch.equal(f.get_tensor(k), t) for k, t in tensors.items())
            ):
                raise FileError(f"{path}: what was written does not read back; is the disk full?")
        with open(temp, "rb") as f:
            os.fsync(f.fileno())
        os.chmod(temp, 0o666 & ~_umask())
        os.replace(temp, path)
    except BaseException:
        Path(temp).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _key(target: Target, short: str) -> str:
    return f"{target.path}.{short}" if target.path else short
