"""The adapter file: one safetensors file whose keys are full state_dict paths and whose header is plain JSON."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.arguments import checked
from ..core.errors import (
    BaseMismatchError,
    FileError,
    LoraLiteWarning,
    StateError,
    did_you_mean,
    listing,
    shown,
)
from ..core.files import check_path, each_tensor, is_finite, opened, read_tensors, reading
from ..core.spec import ParamSpec
from ..runtime.call.acting import warn_idle
from ..runtime.commit import commit
from ..runtime.compact import compacted
from ..runtime.handle import Adapter
from ..runtime.layers.offload import brought_back, is_away
from ..runtime.layers.read import fingerprint
from ..runtime.layers.tensors import is_sharded
from ..runtime.model.record import Record, Target
from ..runtime.model.site import owned_tensors, tensor_on
from ..runtime.model.state import not_called_elsewhere, not_merged, record_of, state_of, unwrap
from ..runtime.model.surroundings import own_surroundings
from ..runtime.model.undo import Undo, all_or_nothing
from ..runtime.start.staging import StagedTarget, filled, modules_of
from ..runtime.targets.loaded import check_loaded
from ..runtime.targets.structure import describe
from .gather import full_tensor
from .header import check_sum, header, read_header, record_from_header, saved_sums
from .tensors import write_tensors

MAX_SAMPLE = 4096
"""Numbers in a fingerprint; ours have 64."""
BaseCheck = Literal["error", "warn", "ignore"]


@checked
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
        compact: after the end of a rank schedule, leave out what was pruned; False keeps it, for a checkpoint that is
            loaded into the same adapter.

    Returns:
        The path written. It is written beside its place, read back, compared, and renamed, so an old file survives a
        crash.

    Raises:
        StateError: the model is merged; a scheduled method was trained without its schedule; a trainable tensor would
            not be saved.
    """
    model = unwrap(model)
    record, state = record_of(model, name), state_of(model)
    not_merged(state, "ll.save, or save the merged model itself with its own save_pretrained")
    _check_schedule(record)
    _check_strangers(model)
    check_path(path)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise FileError(f"dtype must be a torch.dtype such as torch.float16, got {dtype!r}.")
    path = _file_name(path)
    tensors = adapter_state_dict(model, record.name)
    if compact and record.variant.compact is not None and 0 < record.total_steps <= record.steps:
        record, tensors = compacted(model, record, tensors)
    if dtype is not None:
        tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
    _check_finite(record, tensors)
    warn_idle(model, state_of(model).records[record.name])
    write_tensors(path, tensors, {"lora_lite": json.dumps(header(record, tensors), sort_keys=True)})
    return path


def _check_schedule(record: Record) -> None:
    if record.variant.on_step is not None and not record.scheduled and record.train_calls > 0:
        raise StateError(
            f"adapter {record.name!r} was trained without its schedule; call ll.schedule(model, optimizer, "
            "total_steps) before training."
        )


def _check_strangers(model: nn.Module) -> None:
    """Raise when something is trainable that no adapter file would hold."""
    own = {id(t) for r in state_of(model).records.values() for _, _, _, t in owned_tensors(model, r)}
    strangers = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if strangers:
        raise StateError(
            f"{len(strangers)} trainable parameters belong to no adapter and would not be saved: "
            f"{listing(strangers)}. Freeze them (requires_grad_(False)), or save them yourself first."
        )


def _file_name(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if os.path.isdir(path):  # which takes names that the system does not
        raise FileError(f"{path} is a folder; give a file name such as {path / 'adapter.safetensors'}.")
    return path if path.suffix else path.with_suffix(".safetensors")


def _check_finite(record: Record, tensors: dict[str, Tensor]) -> None:
    bad = [k for k, t in tensors.items() if t.is_floating_point() and not is_finite(t)]
    if bad:
        raise StateError(
            f"adapter {record.name!r} has values that are not finite: {listing(bad)}. Training diverged; nothing was "
            "written."
        )


def load_native(
    model: nn.Module, path: str | os.PathLike[str], name: str, trainable: bool, base_check: BaseCheck
) -> Adapter:
    """Attach an adapter from a file written by `save`."""
    return commit(model, *read_native(model, path, name, base_check), trainable)


@own_surroundings()
def read_native(
    model: nn.Module, path: str | os.PathLike[str], name: str, base_check: BaseCheck
) -> tuple[Record, list[StagedTarget]]:
    """The adapter of a file, ready to be put on the model, which is only looked at."""
    head = read_header(path)
    with reading(path):
        record = record_from_header(model, head, name, str(path))
        check_loaded(describe(model), record.targets.values())
        with opened(path) as f:  # nothing is read that would not be used
            _check_names(expected(record), f.keys(), str(path))
    staged = filled(model, record, _checked(path, head, record))
    with reading(path):
        if base_check != "ignore":
            check_base(model, record, head, base_check, str(path))
    return record, staged


def _checked(path: str | os.PathLike[str], head: dict[str, Any], record: Record) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of a file, one after the other, each as its target wants it and as it was saved."""
    where, wanted = str(path), expected(record)
    with reading(path):
        sums = saved_sums(head, record)
        for key, t in each_tensor(path, wanted):
            _check_tensor(key, t, wanted[key], where)
            if t.is_floating_point() and not is_finite(t):
                raise FileError(f"{where} holds values that are not finite: {key}.")
            check_sum(key, t, sums, where)
            yield key, t


@checked
@own_surroundings()
def adapter_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Full `state_dict` path (without the adapter's name) -> CPU copy of everything the adapter owns, gathered from
    shards.

    Which tensors those are is decided by ownership, never by their names.
    """
    record = record_of(model, name)
    found: dict[str, Tensor] = {}
    for target, short, module, tensor in owned_tensors(model, record):
        whole = _at_hand(module, target.path, tensor)
        if tuple(whole.shape) != target.specs[short].shape:
            raise StateError(
                f"{target.path}.{short} has shape {tuple(whole.shape)} where {target.specs[short].shape} is expected: "
                "sharded training left an incomplete tensor; nothing was saved."
            )
        if whole.is_meta:
            raise StateError(
                f"{target.path}.{short} is on the meta device and has no values; nothing was saved. Load the model's "
                "weights first, then attach."
            )
        found[target.key(short)] = whole.to("cpu", copy=True).contiguous()
    return found


def _at_hand(module: nn.Module, path: str, tensor: Tensor) -> Tensor:
    """The whole tensor: gathered from shards, or from where accelerate keeps it."""
    if not tensor.is_meta or not is_away(module):
        return full_tensor(tensor).detach()
    attribute = next(k for k, t in (*module._parameters.items(), *module._buffers.items()) if t is tensor)
    with torch.no_grad(), brought_back(module, path):
        found = tensor_on(module, attribute)
        assert found is not None
        return found.detach()


@checked
def load_adapter_state_dict(model: nn.Module, name: str | None, state: dict[str, Tensor]) -> None:
    """Copy tensors of `adapter_state_dict` into an attached adapter, in place; compiled code stays valid.

    Raises:
        FileError: keys or shapes do not agree exactly; nothing is copied then.
    """
    record = record_of(model, name)
    if not isinstance(state, Mapping):
        raise FileError(f"a state dict is needed, as ll.adapter_state_dict gives it; got {type(state).__name__}.")
    own = {target.key(short): tensor for target, short, _, tensor in owned_tensors(model, record)}
    check_keys(expected(record), state, "the state dict")
    if any(is_sharded(t) for t in own.values()):
        raise StateError("the model is sharded; load the adapter before sharding, or use torch's set_model_state_dict.")
    not_called_elsewhere(unwrap(model), "ll.load_adapter_state_dict")

    @torch.no_grad()
    def copy(values: Mapping[str, Tensor]) -> None:
        for key, tensor in own.items():
            tensor.copy_(values[key])

    def steps(undo: Undo) -> None:
        with own_surroundings():
            old = {key: tensor.detach().clone() for key, tensor in own.items()}
            undo(lambda: copy(old))
            copy(state)

    all_or_nothing(steps)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of an adapter file."""
    return read_header(path), read_tensors(path)


def expected(record: Record) -> dict[str, ParamSpec]:
    """Key -> spec of every tensor that the adapter owns."""
    return {t.key(short): spec for t in record.targets.values() for short, spec in t.specs.items()}


def _check_names(wanted: Iterable[str], got: Iterable[str], where: str) -> None:
    wanted, got = dict.fromkeys(wanted), dict.fromkeys(got)
    missing, extra = [k for k in wanted if k not in got], [k for k in got if k not in wanted]
    if missing or extra:
        hint = did_you_mean(missing[0], extra) if missing and extra else ""
        parts = [f"{len(missing)} tensors are missing: {listing(missing)}."] * bool(missing) + [
            f"{len(extra)} are unexpected: {listing(extra)}."
        ] * bool(extra)
        raise FileError(f"{where}: {' '.join(parts)}{hint}")


def check_keys(wanted: dict[str, ParamSpec], got: dict[str, Tensor], where: str) -> None:
    """Raise `FileError` where names, shapes, dtypes or whole numbers are not the wanted ones."""
    _check_names(wanted, got, where)
    for key, want in wanted.items():
        _check_tensor(key, got[key], want, where)


def _check_tensor(key: str, got: Tensor, want: ParamSpec, where: str) -> None:
    if tuple(want.shape) != tuple(got.shape):
        raise FileError(f"{where}: {key} has shape {tuple(got.shape)}, expected {tuple(want.shape)}.")
    dtype = want.dtype or torch.float32
    if got.dtype != dtype and not (dtype.is_floating_point and got.is_floating_point()):
        raise FileError(f"{where}: {key} holds {got.dtype}, expected {dtype}.")
    if not want.holds(got):
        raise FileError(f"{where}: {key} holds numbers outside of its range (below {want.below}).")


def check_strictness(base_check: object) -> None:
    """Refuse a `base_check` that is none.

    Raises:
        FileError: it is another word, or no word at all.
    """
    if base_check not in ("error", "warn", "ignore"):
        raise FileError(f"base_check must be 'error', 'warn' or 'ignore', got {shown(base_check)}.")


def check_base(model: nn.Module, record: Record, head: dict[str, Any], base_check: str, where: str) -> None:
    """Compare each target's fingerprint with the file's, within the coarser dtype's rounding; quantised bases only
    warn."""
    modules = modules_of(model, record.targets.values())
    noticed = False
    for target in record.targets.values():
        old = _saved_fingerprint(target, head, where)
        new = fingerprint(modules[target.path]) if old else {}
        if not new or (error := _distance(old, new)) <= _rounding(old, new):
            continue
        if error <= 0.5 and (bool(old.get("quantised")) or bool(new["quantised"])):
            if not noticed:
                warnings.warn(
                    f"{where}: the base of {target.path} is quantised differently (sampled weights differ by "
                    f"{error:.1%}); outputs will differ slightly.",
                    LoraLiteWarning,
                    stacklevel=5,
                )
            noticed = True
            continue
        text = (
            f"{where}: the adapter was trained on other base weights: at {target.path} sampled weights differ by "
            f"{error:.1%}. Load the base it was trained on, or pass base_check='warn' if you mean it."
        )
        if base_check == "error":
            raise BaseMismatchError(text)
        warnings.warn(text, LoraLiteWarning, stacklevel=5)
        return


def _saved_fingerprint(target: Target, head: dict[str, Any], where: str) -> dict[str, Any]:
    """The fingerprint of a target's base in a file; empty where it has none."""
    found = head["targets"][target.path].get("base")
    if not isinstance(found, dict) or not isinstance(found.get("sample"), list):
        return {}
    with reading(where, f"the fingerprint of {target.path}"):
        if len(found["sample"]) > MAX_SAMPLE or not all(math.isfinite(v) for v in found["sample"]):
            raise ValueError(f"{len(found['sample'])} numbers")
    return found


def _distance(old: dict[str, Any], new: dict[str, Any]) -> float:
    """Relative distance of the sampled weights of two fingerprints."""
    a, b = torch.tensor(old["sample"], dtype=torch.float64), torch.tensor(new["sample"], dtype=torch.float64)
    return float((a - b).norm() / a.norm().clamp_min(1e-30)) if a.shape == b.shape else float("inf")


def _rounding(old: dict[str, Any], new: dict[str, Any]) -> float:
    """What the coarser of two dtypes rounds away."""
    return max({"bfloat16": 2**-7, "float16": 2**-9}.get(str(d), 2**-18) for d in (old.get("dtype"), new["dtype"]))
