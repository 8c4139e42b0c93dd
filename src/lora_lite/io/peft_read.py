"""A folder in PEFT's layout, read: every tensor goes to a row of the table of types, or it raises."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import AdapterConfig
from ..core.errors import FileError, LoraLiteWarning, did_you_mean, listing, shown
from ..core.files import opened, parsed, read_tensors, reading
from ..core.registry import get_variant
from ..runtime.commit import commit
from ..runtime.handle import Adapter
from ..runtime.layers.kinds import kind_of
from ..runtime.layers.tensors import bias_of
from ..runtime.model.record import Record, Target
from ..runtime.model.surroundings import own_surroundings
from ..runtime.plan import tied_targets
from ..runtime.start.staging import filled
from ..runtime.targets.choose import add_shared
from ..runtime.targets.loaded import check_loaded
from ..runtime.targets.structure import Structure, describe
from .native import check_keys, expected
from .peft_experts import unpacked
from .peft_names import Matcher
from .peft_prompts import KEYS, PROMPTS, read_prompt
from .peft_site import Reading, Site, target_on
from .peft_tables.lora import token_rows
from .peft_types import TYPES, Row
from .peft_whole import Values, called, patterns, split_whole, whole_targets

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SHARED = "base_model."
TOKENS = "token_adapter."
AUTOMATIC = ("classifier", "score", "qa_outputs")
"""What PEFT itself adds to modules_to_save for a task, whether the model has it or not."""
UNREAD = {
    "LILY": " PEFT averages its router over all tokens of a batch: one row changes another, which no method here does.",
    "XLORA": " It mixes other adapters; load those, and mix them with ll.combine or molora.",
    "SHADOW": " It is a second model beside the base.",
}
"""Types of which no method here is the same function."""
MAX_CONFIG = 16 << 20
"""Bytes of adapter_config.json."""
MAX_TENSORS = 64
"""On one layer."""
Tensors = dict[str, Tensor]


def load_peft(model: nn.Module, folder: Path, name: str, trainable: bool) -> Adapter:
    """Attach the adapter of a folder."""
    return attach_peft(model, read_config(folder), read_folder(folder, model), name, trainable, str(folder))


def attach_peft(
    model: nn.Module, config: dict[str, Any], tensors: Tensors, name: str, trainable: bool, where: str
) -> Adapter:
    """Attach an adapter from adapter_config.json's fields and tensors of PEFT's names.

    Raises:
        FileError: the type is not read, a field asks for what is not read, or a tensor fits nothing.
    """
    with own_surroundings(), reading(where):
        record, keyed, same = _read(model, config, tensors, name, where)
    del tensors  # or the file's tensors would stay beside the adapter's until the end
    if trainable and not same:
        warnings.warn(
            f"{where}: {config.get('peft_type')} is read as variant {record.cfg.variant!r}: the same function, which "
            "training changes in another way than PEFT's.",
            LoraLiteWarning,
            stacklevel=4,
        )
    try:
        return commit(model, record, filled(model, record, _taken(keyed)), trainable)
    except (TypeError, RuntimeError) as e:  # a layer with a forward of its own that is none of its kind
        raise FileError(f"{where}: the layers of this model cannot be adapted ({type(e).__name__}: {e}).") from None


def _taken(tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    """The tensors, each let go of once it is used."""
    for key in list(tensors):
        yield key, tensors.pop(key)


def _read(
    model: nn.Module, config: dict[str, Any], tensors: Tensors, name: str, where: str
) -> tuple[Record, Tensors, bool]:
    """The adapter, its values by their keys, and whether training changes what PEFT trains."""
    named = {_short(k): t for k, t in tensors.items()}
    if config.get("peft_type") in PROMPTS:
        record, values, same = read_prompt(model, config, named, name)
    else:
        record, values, same = _Reader(model, config, named, where).read(name)
    own = [(path, t) for path, t in record.targets.items() if not t.tied]
    keyed = {t.key(short): values[path][short] for path, t in own for short in t.specs}
    check_keys(expected(record), keyed, where)
    return record, keyed, same


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, checked to be of a type that the table has."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileError(
            f"{folder} holds no adapter_config.json. For lora_lite's own format pass the .safetensors file."
        )
    with reading(folder):
        with path.open("rb") as f:
            text = f.read(MAX_CONFIG + 1)
        if len(text) > MAX_CONFIG:
            raise FileError(f"{path} has more than {MAX_CONFIG} bytes, which no configuration has.")
        config = parsed(text, str(path))
        if not isinstance(config, dict):
            raise FileError(f"{path}: a mapping is expected, not {type(config).__name__}.")
        if config.get("peft_type") not in list(PROMPTS):
            row_of(config)
    return config


def peft_paths(folder: Path) -> list[str]:
    """The layers whose pairs of factors a folder holds; none where it holds no file of tensors."""
    path = folder / WEIGHTS
    if not path.is_file():
        return []
    with opened(path) as f:
        return [_short(key).partition(".lora_")[0] for key in f.keys() if ".lora_" in key]


def read_folder(folder: Path, model: nn.Module) -> Tensors:
    """adapter_model.safetensors; nothing is read where some tensors belong to no module of the model."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileError(
            f"{folder} holds no adapter_model.safetensors; pickled adapters (adapter_model.bin) are never read."
        )
    with opened(path) as f:
        check_owners(list(f.keys()), model)
    return read_tensors(path)


def check_owners(keys: list[str], model: nn.Module) -> None:
    """Raise where a tensor belongs to no module of the model, or one module has too many."""
    modules = {path for path, _ in model.named_modules()}
    owners = Counter(_owner(_short(key), modules) for key in keys)
    if foreign := [k for k in keys if not _owner(_short(k), modules)]:
        absent = _short(foreign[0]).partition(".lora_")[0]
        raise FileError(
            f"{len(foreign)} tensors belong to no module of the model: {listing(foreign)}."
            f"{did_you_mean(absent, modules)}"
        )
    for path, n in owners.items():
        if n > MAX_TENSORS and path != SHARED:
            raise FileError(f"{n} tensors of {shown(path)}; no adapter has more than {MAX_TENSORS} on one layer.")


def _owner(key: str, modules: Container[str]) -> str:
    """The path of the module to which a tensor belongs: `SHARED` for the whole model, empty for none."""
    if key.startswith(SHARED) or key in KEYS:
        return SHARED
    path = key
    while path and path not in modules:
        path = path.rpartition(".")[0]
    return path


def row_of(config: dict[str, Any]) -> Row:
    """The row of a config's peft_type."""
    found = config.get("peft_type")
    if not isinstance(found, str) or found not in TYPES:
        merged = f"{did_you_mean(str(found)[:99], TYPES)} Merge the adapter in PEFT and load the merged model."
        raise FileError(
            f"peft_type {shown(found)} cannot be read.{UNREAD.get(str(found), merged)} These can: "
            f"{', '.join(sorted((*TYPES, *PROMPTS)))}."
        )
    return TYPES[found]


def _short(key: str) -> str:
    """The name of a tensor behind PEFT's prefix; what belongs to the whole model keeps the prefix `SHARED`."""
    return key.removeprefix(PREFIX).replace("._orig_mod.", ".").removeprefix("_orig_mod.")


@dataclass
class _Reader:
    """One folder and one model."""

    model: nn.Module
    config: dict[str, Any]
    tensors: Tensors
    where: str
    same: bool = True
    biases: Tensors = field(default_factory=dict[str, Tensor])
    """Path -> trained bias of the base."""

    def __post_init__(self) -> None:
        self.modules = {path: m for path, m in self.model.named_modules() if path}
        self.match = Matcher(list(self.modules), self.where)
        self.row = row_of(self.config)

    def read(self, name: str) -> tuple[Record, Values, bool]:
        """The record, the tensors of its targets, and whether all of it is what PEFT trains."""
        saved = self._saved_whole()
        pairs, sites = self._pairs(), self._sites()
        readings = {path: self._one(site) for path, site in sites.items()}
        cfg = self._main(readings, list(saved))
        readings |= self._other_biases(readings)
        experts, values = self._experts(cfg, pairs)
        targets: dict[str, Target] = {}
        for path, found in readings.items():
            site = sites.get(path) or self._site(path, {}, {})
            targets[path], values[path] = target_on(site, found, cfg)
            self._check_used(site)
        kept = Counter(t.cfg.variant for t in targets.values())
        if targets and cfg.variant not in kept and not experts:  # all were read as changes of the weight
            most = kept.most_common(1)[0][0]
            cfg = next(t.cfg for t in targets.values() if t.cfg.variant == most)
        own = [t for t in targets.values() if t.cfg.variant == cfg.variant]
        if own and own[0].variant.shared_specs is not None:
            add_shared(own, cfg)
        targets |= experts
        whole, differences = whole_targets(saved, self.modules, cfg, Path(self.where))
        values |= differences
        structure = describe(self.model)
        targets |= whole
        targets |= _tied(structure, targets)
        if not targets:
            raise FileError("adapter_model.safetensors holds no tensor.")
        check_loaded(structure, targets.values())
        return Record(name, get_variant(cfg.variant), cfg, targets), values, self.same

    # ---- what is no tensor of the method
    def _saved_whole(self) -> Values:
        """Takes out of the tensors what the file holds of the modules in `modules_to_save`."""
        names = self.config.get("modules_to_save") or []
        if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
            raise FileError(f"modules_to_save must be a list of names, got {shown(names)}.")
        saved, self.tensors = split_whole(names, self.modules, self.tensors, "")
        for n in names:
            absent = n in AUTOMATIC and not any(called(path, [n]) for path in self.modules)
            if not absent and not any(called(path, [n]) for path in saved):
                raise FileError(f"modules_to_save names {shown(n)}, of which the file holds no tensor.")
        return {**saved, **self._loose()}

    def _loose(self) -> Values:
        """Weights and biases of the base itself, which PEFT saves beside the adapter: those that equal the model's say
        nothing, and a whole layer that differs is a change of it."""
        found: Values = {}
        for key in list(self.tensors):
            path, _, attribute = key.rpartition(".")
            inside = path.endswith(".base_layer") or path == "base_layer"
            path = path.removesuffix(".base_layer")
            if attribute not in ("weight", "bias") or path not in self.modules:
                continue
            value = self.tensors.pop(key)
            if attribute == "bias":
                self.biases[path] = value
            elif not self._is_base(path, value):
                if inside:
                    raise FileError(
                        f"{key} differs from this model's weight, and the adapter stands on it: load "
                        "the base with the embedding that it was trained on."
                    )
                found[path] = {"weight": value}
        for path in found:
            if path in self.biases:
                found[path]["bias"] = self.biases.pop(path)
        return found

    def _is_base(self, path: str, value: Tensor) -> bool:
        own = self.modules[path]._parameters.get("weight")
        if own is None or own.shape != value.shape:
            raise FileError(
                f"the file holds a weight {tuple(value.shape)} of {path}, which is "
                f"{'nothing' if own is None else tuple(own.shape)} here; resize_token_embeddings first, as for "
                "training."
            )
        return torch.allclose(own.detach().float().cpu(), value.float(), atol=1e-6, rtol=2**-8)

    def _other_biases(self, readings: dict[str, Reading]) -> dict[str, Reading]:
        """Trained biases of the base: a change on layers that the method stands on, and on others a reading of their
        own."""
        found: dict[str, Reading] = {}
        for path, value in self.biases.items():
            old = bias_of(self.modules[path])
            if old is None or old.shape != value.shape:
                raise FileError(f"the file holds a bias {tuple(value.shape)} of {path}.")
            change = value.float() - old.detach().float().cpu()
            if not bool(change.abs().max() > 1e-6):
                continue
            if path in readings:
                more = readings[path].bias
                readings[path].bias = change if more is None else more + change
            else:
                found[path] = Reading("bitfit", {}, {"lora_b": change})
        return found

    # ---- the layers
    def _sites(self) -> dict[str, Site]:
        """Path -> what the file holds of it, in the model's order."""
        own: dict[str, Tensors] = {}
        for key, t in self.tensors.items():
            path = self._owner(key)
            if path != SHARED:
                own.setdefault(path, {})[key[len(path) + 1 :]] = t
        own |= {path: {} for path in self.modules if self.row.named and self._is_named(path)}
        found = {path: kind_of(self.modules[path]) for path in self.modules if path in own}
        sizes = {path: kind.size(self.modules[path]) or (0, 0) for path, kind in found.items() if kind is not None}
        alone = all(kind is not None and kind.plain_vectors for kind in found.values()) and not any(
            path in own for path in self.biases
        )
        return {path: self._site(path, own[path], sizes, alone) for path in found}

    def _is_named(self, path: str) -> bool:
        """Whether target_modules names a layer that exclude_modules does not."""
        chosen = self.match.named(self.config.get("target_modules"), path)
        return chosen and not self.match.named(self.config.get("exclude_modules"), path)

    def _site(self, path: str, tensors: Tensors, sizes: dict[str, tuple[int, int]], alone: bool = False) -> Site:
        module = self.modules[path]
        kind = kind_of(module)
        if kind is None:
            raise FileError(f"{path} is a {type(module).__name__}, no layer that can be adapted.")
        shared = {k.removeprefix(SHARED): t for k, t in self.tensors.items() if k.startswith(SHARED)}
        return Site(path, module, kind, self.config, tensors, shared, sizes, alone, self.match, self.where)

    def _owner(self, key: str) -> str:
        """The layer that a tensor belongs to, which must be there."""
        path = _owner(key, self.modules)
        if path == SHARED:
            return path
        rest = key[len(path) + 1 :]
        if path and isinstance(self.modules[path], nn.MultiheadAttention):
            raise FileError(
                f"tensor {key!r} changes the weights of {path}, an nn.MultiheadAttention, which multiplies by them "
                "without calling a layer. Merge the adapter in PEFT and load the merged model."
            )
        if not path or "base_layer." in rest and not self.config.get("target_parameters"):
            absent = rest.partition(".lora_")[0] if path else key.partition(".lora_")[0]
            raise FileError(f"tensor {key!r} belongs to no layer of this model.{did_you_mean(absent, self.modules)}")
        return path

    def _one(self, site: Site) -> Reading:
        if any(n.startswith(TOKENS) for n in site.tensors) and self.config.get("peft_type") != "TRAINABLE_TOKENS":
            found = token_rows(site)
        else:
            found = self.row.read(site)
        self.same = self.same and found.same
        return found

    def _check_used(self, site: Site) -> None:
        if site.tensors:
            raise FileError(
                f"{site.path} holds more than {self.config['peft_type']} has: {listing(sorted(site.tensors))}."
            )

    def _experts(self, cfg: AdapterConfig, pairs: Values) -> tuple[dict[str, Target], Values]:
        """Targets and tensors of fused experts."""
        names = self.config.get("target_parameters") or []
        linear = [f".{path}.weight" for path, m in self.modules.items() if kind_of(m) is not None]
        banks = [n for n in names if not any(p.endswith(f".{n}") for p in linear)] if isinstance(names, list) else names
        found = unpacked(self.model, {**self.config, "target_parameters": banks}, pairs, cfg, Path(self.where))
        if pairs:
            raise FileError(f"{next(iter(pairs))} is no layer of this model that can be adapted.")
        return found

    def _pairs(self) -> Values:
        """Takes out of the tensors the factors on modules that are no layers: those of fused experts."""
        pairs: Values = {}
        for key in list(self.tensors) if self.config.get("target_parameters") else []:
            path, _, letter = key.removesuffix(".weight").rpartition(".")
            owner = self.modules.get(path.replace(".base_layer", ""))
            if letter in ("lora_A", "lora_B") and owner is not None and kind_of(owner) is None:
                pairs.setdefault(path, {})[letter] = self.tensors.pop(key).float()
        return pairs

    def _main(self, readings: dict[str, Reading], saved: list[str]) -> AdapterConfig:
        """The adapter's config: that of the method of most layers, with the fields of its first one."""
        names = Counter(r.variant for r in readings.values())
        if len(names) > 1:
            names.pop(token_rows.__name__, None)  # which stand beside it
        method = get_variant(names.most_common(1)[0][0] if names else self.row.variant)
        first = next((r.options for r in readings.values() if r.variant == method.name), {})
        dropout = next((v for k, v in self.config.items() if k.endswith("_dropout") and k != "module_dropout"), 0.0)
        common: dict[str, Any] = {"variant": method.name, "train_modules": patterns(saved), **first}
        if isinstance(dropout, float) and 0 < dropout < 1 and "dropout" not in method.ignores:
            common["dropout"] = dropout
        if not first:
            r, alpha = self.config.get("r"), self.config.get("lora_alpha")
            common |= {"r": r} if isinstance(r, int) and not isinstance(r, bool) and r > 0 else {}
            common |= {"alpha": float(alpha)} if isinstance(alpha, (int, float)) and alpha else {}
        return method.config(**common)


def _tied(structure: Structure, targets: dict[str, Target]) -> dict[str, Target]:
    """What acts on a layer too that shares the weight of a target."""
    owners = [t for t in targets.values() if t.variant.tied is not None]
    places = {s.path: s for s in structure.places}
    _, more = tied_targets(structure, [places[t.path] for t in owners], owners)
    return {t.path: t for t in more}
