"""Merging file to file: adapters into a checkpoint that may be larger than memory, one tensor at a time.

W is read, and W' goes block by block to its place in the new file: W itself is all that is held. What no adapter
changes is copied byte for byte.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import FileError, StateError, did_you_mean
from ..core.files import parsed, reading
from ..runtime.layers.tensors import bias_of
from ..runtime.merge import Measured, MergeReport, fold_cell, mergeable
from ..runtime.model.kind import Part
from ..runtime.model.site import Site, Slot
from ..runtime.model.state import not_merged, state_of, unwrap
from ..runtime.progress import track
from .header import MAX_HEADER, read_header
from .native import BaseCheck, check_base
from .places import replaced_folder

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Endings of weights, which are not copied beside the merged ones."""
SMALL = 1 << 16
"""Parameters of so few numbers are loaded at once: kinds of layers, such as norms, are known by what they do."""
CHUNK = 1 << 24
"""Bytes copied at once."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes of weights that an adapter can change."""


class Stored(NamedTuple):
    """Where a tensor stands in a safetensors file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset in the file."""
    size: int
    """In bytes."""


# ---- the checkpoint


def checkpoint_tensors(folder: Path) -> dict[str, Stored]:
    """Name -> place of every tensor of a checkpoint, in the order of its files.

    Raises:
        FileError: there are no safetensors weights, or they are damaged.
    """
    index = folder / INDEX
    if index.is_file():
        with reading(index):
            names = list(dict.fromkeys(parsed(index.read_bytes(), str(index))["weight_map"].values()))
        if wrong := [n for n in names if Path(n).name != n]:
            raise FileError(f"{index} names {wrong[0]!r}, which is no file of its folder.")
    else:
        names = [SINGLE]
    found: dict[str, Stored] = {}
    for name in sorted(names):
        if not (folder / name).is_file():
            raise FileError(f"{folder} holds no {name}. Weights are read from safetensors files only, never pickles.")
        found |= _tensors_of(folder / name)
    return found


def _tensors_of(path: Path) -> dict[str, Stored]:
    with reading(path), path.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        if size > MAX_HEADER:
            raise FileError(f"{path} is no safetensors file (its header claims {size} bytes).")
        head: dict[str, Any] = parsed(f.read(size), str(path))
        head.pop("__metadata__", None)
        found = {}
        for name, entry in sorted(head.items(), key=lambda item: item[1]["data_offsets"][0]):
            start, end = entry["data_offsets"]
            found[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + size + start, end - start)
        if found and max(s.start + s.size for s in found.values()) > path.stat().st_size:
            raise FileError(f"{path} is cut short. Copy or download it again.")
        return found


def read_stored(place: Stored) -> Tensor:
    """The tensor itself, in memory of its own: a mapped file would count twice."""
    t = torch.empty(place.shape, dtype=DTYPES[place.dtype])
    with reading(place.file), place.file.open("rb", buffering=0) as f:
        f.seek(place.start)
        room, done = _bytes(t), 0
        while done < place.size and (n := f.readinto(room[done : done + CHUNK])):
            done += n
    return t


def hollow(model: nn.Module, found: Mapping[str, Stored]) -> None:
    """Give a model on the meta device weights that take no memory, one zero each, so that adapters can be loaded; small
    ones get their values."""
    names = {id(p): name for name, p in model.named_parameters()}
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for short, p in module._parameters.items():
            if p is not None:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(_stand_in(model, names[id(p)], p, found), requires_grad=False)
                module._parameters[short] = made[id(p)]
        for short, b in module._buffers.items():
            if b is not None and b.is_meta:
                module._buffers[short] = torch.zeros((), dtype=b.dtype).expand(b.shape)


def _stand_in(model: nn.Module, name: str, p: Tensor, found: Mapping[str, Stored]) -> Tensor:
    key = key_in(model, name, found)
    if p.numel() <= SMALL and key is not None and found[key].dtype in DTYPES:
        return read_stored(found[key]).to(p.dtype).view(p.shape)
    return torch.zeros((), dtype=p.dtype).expand(p.shape)


def key_in(model: nn.Module, name: str, found: Mapping[str, Stored]) -> str | None:
    """A parameter's name in the checkpoint, which may have been saved with or without the head around it."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for key in (name, name.removeprefix(prefix), f"{prefix}{name}"):
        if key in found:
            return key
    return None


# ---- the new files


@dataclass
class Shard:
    """One file to be: its tensors and where they will stand."""

    name: str
    tensors: dict[str, Stored]
    """Those of the old files."""

    def header(self) -> bytes:
        head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for key, old in self.tensors.items():
            head[key] = {"dtype": old.dtype, "shape": list(old.shape), "data_offsets": [at, at + old.size]}
            at += old.size
        text = json.dumps(head, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def shards(found: Mapping[str, Stored], limit: int | None) -> list[Shard]:
    """The files to be: cut as the old ones, or so that none is larger than `limit` bytes unless one tensor is."""
    parts: list[dict[str, Stored]] = []
    for key, old in found.items():
        size = sum(s.size for s in parts[-1].values()) if parts else 0
        last = list(parts[-1].values())[-1] if parts else None
        new = last is None or (last.file != old.file if limit is None else size + old.size > limit)
        if new:
            parts.append({})
        parts[-1][key] = old
    if len(parts) == 1:
        return [Shard(SINGLE, parts[0])]
    return [Shard(f"model-{i:05d}-of-{len(parts):05d}.safetensors", part) for i, part in enumerate(parts, 1)]


def merge_files(
    model: nn.Module,
    source: Path,
    out: Path,
    shard_size: int | None = None,
    adapter_files: Mapping[str, Path] | None = None,
    base_check: BaseCheck = "error",
) -> MergeReport:
    """Write a checkpoint with the active adapters of `model` merged into its weights, and what else its folder holds.

    Args:
        model: of the checkpoint's architecture, `hollow`, with the adapters loaded; it stays as it is.
        source: folder of safetensors weights.
        out: the new folder, which appears when it is whole.
        shard_size: largest file in bytes; None: files as before.
        adapter_files: adapter -> its file of ours, whose fingerprints are compared with the weights.

    Raises:
        StateError: a method is not affine, or adds a bias where the checkpoint has none.
        FileError: damaged files, another architecture, or a full disk.
        BaseMismatchError: an adapter was trained on other weights.
    """
    model = unwrap(model)
    state = state_of(model)
    not_merged(state, "merging files")
    if not state.active:
        raise StateError("no adapter is active; activate one: ll.activate(model, ...).")
    found = checkpoint_tensors(source)
    heads = {name: read_header(path) for name, path in (adapter_files or {}).items()}
    work = _Work(model, found, heads, base_check, MergeReport([n for n, _ in state.active], 0, {}, {}, []))
    targets = mergeable(model, state, state.active, dequantize=False)
    keys = {work.key(path, site.kind.stored(layer)): (path, layer, site) for path, layer, site in targets}
    files = shards(found, shard_size)
    with replaced_folder(out, files[0].name) as new:
        work.places = {key: (new / s.name, at) for s in files for key, at in _offsets(s).items()}
        for shard in files:
            _write(new / shard.name, shard, keys, work)
        for key, b in work.biases.items():
            path, at = work.places[key]
            with path.open("r+b") as f:
                f.seek(at)
                f.write(_bytes(b.to(DTYPES[found[key].dtype])))
        _others(source, new, files)
    work.report.n_layers = len(targets)
    return work.report


def _offsets(shard: Shard) -> dict[str, int]:
    at, found = len(shard.header()), {}
    for key, old in shard.tensors.items():
        found[key] = at
        at += old.size
    return found


def _write(path: Path, shard: Shard, keys: Mapping[str, tuple[str, nn.Module, Site]], work: _Work) -> None:
    """One file: header, then every tensor copied or merged."""
    offsets = _offsets(shard)
    with path.open("w+b") as f:
        f.write(shard.header())
        for key, old in track(list(shard.tensors.items()), path.name):
            if key in keys:
                work.fold(f, offsets[key], key, *keys[key])
            else:
                _copy(old, f, offsets[key])
        f.flush()
        os.fsync(f.fileno())


def _copy(old: Stored, f: IO[bytes], at: int) -> None:
    f.seek(at)
    with old.file.open("rb") as source:
        source.seek(old.start)
        left = old.size
        while left and (chunk := source.read(min(left, CHUNK))):
            f.write(chunk)
            left -= len(chunk)


def _bytes(t: Tensor) -> memoryview:
    """The bytes of a tensor, which are the tensor's own where it is contiguous."""
    data: Any = t.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(data)


@dataclass
class _Work:
    """What merging the tensors of one checkpoint has in common."""

    model: nn.Module
    found: dict[str, Stored]
    heads: dict[str, Any]
    base_check: BaseCheck
    report: MergeReport
    places: dict[str, tuple[Path, int]] = dataclasses.field(default_factory=dict)
    biases: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Those that change, written at the end: their place may lie in a file that is done."""

    def key(self, path: str, weight: Tensor) -> str:
        """The name of a target's weight in the checkpoint.

        Raises:
            FileError: it has none, or another shape there.
        """
        name = next((n for n, p in self.model.named_parameters() if p is weight), f"{path}.weight")
        key = key_in(self.model, name, self.found)
        hint = "transformers makes it from other tensors while loading. Merge in memory: ll.merge, save_pretrained."
        if key is None:
            raise FileError(f"the checkpoint holds no {name}.{did_you_mean(name, self.found)} If the base fits, {hint}")
        place = self.found[key]
        if place.shape != tuple(weight.shape) or place.dtype not in DTYPES:
            raise FileError(
                f"{place.file} stores {key} as {place.dtype} {list(place.shape)}, and the model has "
                f"{list(weight.shape)}: {hint}"
            )
        return key

    def fold(self, f: IO[bytes], at: int, key: str, path: str, layer: nn.Module, site: Site) -> None:
        """One weight with its adapters, block by block into its place."""
        slots = [(site.slots[n], w) for n, w in state_of(self.model).active if n in site.slots]
        stored, bias = site.kind.stored(layer), bias_of(layer)
        bias_key = None if bias is None else key_in(self.model, f"{path}.bias", self.found)
        measured = Measured()
        with torch.no_grad(), self._loaded(stored, bias, key, bias_key):
            self._check(path, slots)
            for cell in site.kind.cells(layer, path):
                matrix = cell.matrix(stored.detach())
                if _inside(matrix, stored):
                    to = _Strided(f, at, matrix, stored.dtype)
                    b = fold_cell(layer, site, cell, slots, matrix, to.write, measured)
                else:
                    b = fold_cell(layer, site, cell, slots, matrix.clone(), cell.write, measured)
                    f.seek(at)
                    f.write(_bytes(stored.detach()))
                self._keep_bias(path, bias, bias_key, b)
        self.report.change[path], self.report.rounding[path] = measured.change, measured.rounding

    def _keep_bias(self, path: str, bias: Tensor | None, key: str | None, b: Tensor) -> None:
        if bias is not None and key is not None:
            self.biases[key] = b
        elif bool(b.any()):
            raise StateError(
                f"{path}: the adapter adds a bias, for which this checkpoint has no tensor, so the architecture would "
                "not load it. Keep the adapter attached."
            )

    @contextmanager
    def _loaded(self, stored: Tensor, bias: Tensor | None, key: str, bias_key: str | None) -> Iterator[None]:
        """The layer with its own weight and bias, which are let go at the end."""
        before = [(stored, stored.data)] + ([(bias, bias.data)] if bias is not None else [])
        stored.data = read_stored(self.found[key])
        if bias is not None and bias_key is not None:
            bias.data = read_stored(self.found[bias_key])
        try:
            yield
        finally:
            for t, data in before:
                t.data = data

    def _check(self, path: str, slots: list[tuple[Slot, float]]) -> None:
        """Compare the fingerprints of one layer."""
        records = state_of(self.model).records
        for slot, _ in slots:
            if slot.name in self.heads and self.base_check != "ignore":
                record = records[slot.name]
                one = dataclasses.replace(record, targets={path: record.targets[path]})
                check_base(self.model, one, self.heads[slot.name], self.base_check, f"adapter {slot.name!r}")


def _inside(matrix: Tensor, stored: Tensor) -> bool:
    """Whether a matrix is the stored weight seen otherwise, one of its strides being 1."""
    return matrix.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr() and 1 in matrix.stride()


class _Strided:
    """Writes parts of a matrix to their places in a file, where it stands as its strides say."""

    def __init__(self, f: IO[bytes], at: int, matrix: Tensor, dtype: torch.dtype) -> None:
        self.f, self.dtype, self.width = f, dtype, dtype.itemsize
        self.at = at + int(matrix.storage_offset()) * self.width
        self.rows, self.columns = (int(n) for n in matrix.stride())
        self.shape = matrix.shape

    def write(self, part: Part, block: Tensor) -> Tensor:
        new = block.to(self.dtype)
        (top, bottom, _), (left, right, _) = (s.indices(n) for s, n in zip(part, self.shape, strict=True))
        if self.columns == 1:
            self._lines(new, top, bottom, left, right - left == self.rows, self.rows)
        else:
            self._lines(new.mT, left, right, top, bottom - top == self.columns, self.columns)
        return new

    def _lines(self, lines: Tensor, first: int, end: int, offset: int, whole: bool, stride: int) -> None:
        """Lines that are contiguous in the file: all at once where they are whole."""
        if whole:
            self.f.seek(self.at + first * stride * self.width)
            self.f.write(_bytes(lines))
            return
        lines = lines.contiguous()
        for i in range(end - first):
            self.f.seek(self.at + ((first + i) * stride + offset) * self.width)
            self.f.write(_bytes(lines[i]))


def _others(source: Path, new: Path, files: list[Shard]) -> None:
    """The index, where there are several files, and whatever else lies in the old folder: config, tokenizer, ..."""
    if len(files) > 1:
        total = sum(s.size for shard in files for s in shard.tensors.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {key: shard.name for shard in files for key in shard.tensors},
        }
        (new / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith(".") and _travels(path.name):
            shutil.copyfile(path, new / path.name)


def _travels(name: str) -> bool:
    return not name.endswith(WEIGHTS) and not name.endswith(".index.json") and name != "run.json"


def size_of(text: str) -> int:
    """`5GB`, `500MB` or `2GiB` in bytes.

    Raises:
        FileError: it is no size.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    unit = next((u for u in units if text.lower().endswith(u.lower())), "")
    try:
        number = float(text[: len(text) - len(unit)]) * units.get(unit, 1)
    except ValueError:
        number = math.nan
    if not 1 <= number < math.inf:
        raise FileError(f"a size such as 5GB or 500MB is needed, got {text!r}.")
    return int(number)
