"""What a layer remembers: the adapters that stand on it, in attach order."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from ...core.config import AdapterConfig
from ...core.errors import StateError
from ...core.registry import get_variant
from ...core.variant import Variant
from .call import Stack
from .kind import Kind
from .record import Record, Target
from .state import DEFAULT, SITE, STATE, ModelState, unwrap

PAGES = ("forward", "forward_input", "weight", "prefix", "tokens", "factors", "by_feature", "act")


class Slot:
    """One adapter as a layer's hook finds it."""

    __slots__ = (
        "act",
        "by_feature",
        "cfg",
        "d_in",
        "d_out",
        "factors",
        "forward",
        "forward_input",
        "keys",
        "kin",
        "name",
        "own_weight",
        "owners",
        "path",
        "prefix",
        "tokens",
        "weight",
    )

    def __init__(self, record: Record, target: Target, owners: dict[str, nn.Module]) -> None:
        self.name, self.path, self.cfg = record.name, target.path, target.cfg
        self.d_in, self.d_out = target.d_in, target.d_out
        self.own_weight = target.variant.own_weight
        self.kin = sys.intern(repr([getattr(self.cfg, name) for name in _own_fields(type(self.cfg))]))
        """What slots must have in common to act with one call."""
        self._pages(target.variant)
        self.keys: Mapping[str, str] = _keys(tuple(target.specs), record.name)
        """Short name -> the attribute under which the tensor stands; all layers of an adapter share the table."""
        if target.shared:
            self.keys = {short: place(target, short, record.name)[1] for short in (*target.specs, *target.shared)}
        self.owners = owners
        """Short name -> the module on which it stands, for shared tensors only."""

    def _pages(self, variant: type[Variant]) -> None:
        for page in PAGES:
            setattr(self, page, getattr(variant, page))

    def __getstate__(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in self.__slots__ if k not in PAGES}

    def __setstate__(self, data: dict[str, Any]) -> None:
        for k, v in data.items():
            setattr(self, k, v)
        self._pages(get_variant(data["cfg"].variant))


@lru_cache(maxsize=1024)
def _own_fields(cfg: type[AdapterConfig]) -> tuple[str, ...]:
    """The fields that a method's config has beside the common ones, and which method it is."""
    common = {f.name for f in dataclasses.fields(AdapterConfig)} - {"variant"}
    return tuple(f.name for f in dataclasses.fields(cfg) if f.name not in common)


@lru_cache(maxsize=8)
def _keys(shorts: tuple[str, ...], adapter: str) -> dict[str, str]:
    return {short: stored_name(short, adapter) for short in shorts}


class Site:
    """All adapters of one layer, in the order in which they were attached. Lives on the layer, outside its
    submodules."""

    def __init__(self, path: str, kind: Kind, state: ModelState, own: tuple[str, ...] = ()) -> None:
        self.path, self.kind, self.state = path, kind, state
        self.own = own
        """The layer's parameters before it was adapted, by attribute: what is the base's."""
        self.slots: dict[str, Slot] = {}
        self.inputs = self.weights = 0
        """How many of them rewrite the input, and how many say what becomes of the weight;"""
        self.has_input = self.has_weight = False
        """whether any does."""
        self.awaited = False
        """Somebody wants to know that it runs, see `call.acting` and `call.vocabulary`."""
        self.found: object = None
        """What its kind found out about the layer, see `Kind.inspect`, once it was"""
        self.inspected = True
        self.ran = False
        """Whether its hooks ever ran."""
        self.stacks: dict[tuple[object, ...], Stack] = {}
        """What calls with one adapter per row keep: groups, and factors side by side, see `rows` and `grouped`."""

    def add(self, slot: Slot) -> None:
        """One more adapter, the last."""
        self.slots[slot.name] = slot
        self._count(slot, 1)

    def remove(self, name: str) -> None:
        """One adapter less; nothing where it is not there."""
        slot = self.slots.pop(name, None)
        self.stacks.clear()  # which hold its tensors
        if slot is not None:
            self._count(slot, -1)

    def keep(self, key: tuple[object, ...], stack: Stack) -> None:
        """Into `stacks`, which stays small."""
        if len(self.stacks) > 11:
            self.stacks.clear()
        self.stacks[key] = stack

    def _count(self, slot: Slot, n: int) -> None:
        self.inputs += n * (slot.forward_input is not None)
        self.weights += n * (slot.weight is not None)
        self.has_input, self.has_weight = self.inputs > 0, self.weights > 0


def stored_name(short: str, adapter: str) -> str:
    """Attribute under which a layer stores an adapter's tensor: `lora_A`, or `lora_A@name` for any but `default`."""
    return short if adapter == DEFAULT else sys.intern(f"{short}@{adapter}")


def place(target: Target, short: str, adapter: str) -> tuple[str, str]:
    """(path of the module on which a tensor stands, its attribute there).

    A tensor that several layers use stands on the model itself: a unit of FSDP2 gathers what stands on its own modules,
    and only the root's unit is gathered wherever a layer runs.
    """
    owner = target.shared.get(short)
    if owner is None:
        return target.path, stored_name(short, adapter)
    if target.tied:
        return owner, stored_name(short, adapter)
    return "", stored_name(f"{short}:{owner.replace('.', ':')}", adapter)


def adapter_attributes(module: nn.Module) -> set[str]:
    """The attributes of a module that hold tensors of adapters."""
    site: Site | None = module.__dict__.get(SITE)
    own = set[str]() if site is None else {a for slot in site.slots.values() for a in slot.keys.values()}
    state: ModelState | None = module.__dict__.get(STATE)
    records = () if state is None else state.records.values()
    return own | {place(t, k, r.name)[1] for r in records for t in r.targets.values() for k in t.shared if not t.tied}


def tensors_of(slot: Slot, module: nn.Module) -> list[Tensor]:
    """Everything with which an adapter acts on a layer, shared tensors included."""
    found = (tensor_on(slot.owners.get(short, module), attribute) for short, attribute in slot.keys.items())
    return [t for t in found if t is not None]


def base_attributes(module: nn.Module) -> Iterable[str]:
    """The attributes of a module that hold parameters of the base, whatever the number of adapters on it."""
    state: ModelState | None = module.__dict__.get(STATE)
    if state is not None:  # on which tensors stand that layers share
        return state.own
    site: Site | None = module.__dict__.get(SITE)
    return module._parameters if site is None else site.own


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(path, parameter) of everything that belongs to no adapter, in a time that does not depend on their number."""
    for path, module in model.named_modules():
        for attribute in base_attributes(module):
            p = module._parameters.get(attribute)
            if p is not None:
                yield (f"{path}.{attribute}" if path else attribute), p


def tensor_on(module: nn.Module, attribute: str) -> Tensor | None:
    """A parameter or buffer of this module by its attribute name."""
    found = module._parameters.get(attribute)
    return found if found is not None else module._buffers.get(attribute)


def owned_tensors(model: nn.Module, record: Record) -> Iterator[tuple[Target, str, nn.Module, Tensor]]:
    """(target, short name, the module on which it stands, tensor) of everything an adapter owns, shared tensors
    once."""
    model = unwrap(model)
    for target in record.targets.values():
        for short in target.specs:
            path, attribute = place(target, short, record.name)
            try:
                module = model.get_submodule(path)
            except AttributeError:
                module = None
            tensor = None if module is None else tensor_on(module, attribute)
            if module is None or tensor is None:
                raise StateError(
                    f"adapter {record.name!r}: {f'{path}.{attribute}'.lstrip('.')} is gone; something replaced the "
                    "layer or deleted its parameters. Detach and load the adapter again."
                )
            yield target, short, module, tensor
