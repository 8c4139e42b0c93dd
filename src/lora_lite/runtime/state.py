"""What the model remembers of its adapters: plain data on the root module, no references to modules, so it survives deepcopy and pickle."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import AdapterConfig
from ..core.errors import SelectionError, StateError, did_you_mean
from ..core.registry import get_variant
from ..core.spec import ParamSpec
from ..core.variant import Variant

STATE, SITE = "_lora_lite_state", "_lora_lite_site"
DEFAULT = "default"


@dataclass
class Target:
    """One adapter on one layer: its path, shape, config and tensors."""

    path: str
    d_in: int
    d_out: int
    cfg: AdapterConfig
    specs: dict[str, ParamSpec]
    kind: str = "linear"
    experts: int = 0
    """Number of experts, whose tensors are stacked along dimension 0; 0 for anything else."""
    shared: dict[str, str] = field(default_factory=dict)
    """Short tensor name -> path of the target that owns it, for tensors shared between targets."""
    base: dict[str, Any] = field(default_factory=dict)
    """Fingerprint of the base weight."""
    tied: str = ""
    """Path of the target whose weight this layer shares and whose tensors act here too."""

    @property
    def variant(self) -> type[Variant]:
        """The method on this layer: the adapter's own, or that of a module trained whole beside it."""
        return get_variant(self.cfg.variant)


@dataclass
class Record:
    """One named adapter."""

    name: str
    variant: type[Variant]
    cfg: AdapterConfig
    targets: dict[str, Target]
    trainable: bool = True
    steps: int = 0
    """How often its schedule was stepped."""
    total_steps: int = 0
    """Length of its schedule."""
    scheduled: bool = False
    """Whether an optimiser drives the schedule. Not copied: the optimiser drives the original."""
    schedule_number: int = 0
    """Counts `ll.schedule` calls: only the last one's hook acts."""
    cast_noticed: bool = False
    """Whether a cast of its tensors by `model.to(dtype)` was warned about."""
    train_calls: int = 0
    """Training forwards without anybody who drives the schedule."""

    @property
    def beside(self) -> list[Target]:
        """Targets of another method than the adapter's own: what `train_modules` names."""
        return [t for t in self.targets.values() if t.cfg.variant != self.cfg.variant]

    def __getstate__(self) -> dict[str, Any]:
        # the method travels by its name, so that a class written in a notebook or a function does too
        return {**self.__dict__, "scheduled": False, "variant": self.variant.name}

    def __setstate__(self, data: dict[str, Any]) -> None:
        self.__dict__.update(data, variant=get_variant(data["variant"]))


PAGES = ("forward", "forward_input", "factors", "by_feature", "act")


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
    )

    def __init__(self, record: Record, target: Target, owners: dict[str, nn.Module]) -> None:
        self.name, self.path, self.cfg = record.name, target.path, target.cfg
        self.d_in, self.d_out = target.d_in, target.d_out
        self.own_weight = target.variant.own_weight
        own = {f.name: getattr(self.cfg, f.name) for f in dataclasses.fields(self.cfg)}
        common = {f.name for f in dataclasses.fields(AdapterConfig)} - {"variant"}
        self.kin = repr({k: v for k, v in own.items() if k not in common})
        """What slots must have in common to act with one call."""
        self._pages(target.variant)
        self.keys = {short: stored_name(short, record.name) for short in (*target.specs, *target.shared)}
        self.owners = owners
        """Short name -> the layer that owns it, for shared tensors only."""

    def _pages(self, variant: type[Variant]) -> None:
        for page in PAGES:
            setattr(self, page, getattr(variant, page))

    def __getstate__(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in self.__slots__ if k not in PAGES}

    def __setstate__(self, data: dict[str, Any]) -> None:
        for k, v in data.items():
            setattr(self, k, v)
        self._pages(get_variant(data["cfg"].variant))


class Site:
    """All adapters of one layer, in the order in which they were attached. Lives on the layer, outside its submodules."""

    def __init__(self, path: str, kind: str, state: ModelState) -> None:
        self.path, self.kind, self.state = path, kind, state
        self.slots: dict[str, Slot] = {}
        self.has_input = False
        self.norm: Any = None
        """What the layer normalises by, where it is a norm; see `norms`."""
        self.stacks: dict[Any, Any] = {}
        """Factors of several adapters side by side, see `grouped`."""


class ModelState:
    """All adapters of one model, and which of them act."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.active: tuple[tuple[str, float], ...] = ()
        self.rows: tuple[str | None, ...] | None = None
        self.row_cache: dict[Any, Any] = {}
        """Index tensors of recent row selections."""
        self.row_epoch = 0
        """Counts `ll.rows` blocks: what one of them stacked is not used by the next."""
        self.base_trainable: list[str] = []
        """Base parameters that required a gradient before the first attach; detach gives it back."""
        self.merged: Any = None
        self.vocabulary: dict[str, int] = {}
        """Rows of the adapted embeddings and heads when they were adapted, see `outside`."""
        self.batch: int | None = None
        """Batch size of the running root call."""
        self.in_call = False
        """A call of the whole model is running."""
        self.call_grad = False
        """Whether the running root call was entered with gradients enabled."""
        self.cut_by_checkpoint = False
        """A reentrant checkpoint ran in the present root call."""
        self.prompt: Any = None
        """What `ll.prompt` says, see `positions`."""
        self.call: Any = None
        """Token positions in the running root call, for the adapters that ask for some."""
        self.previous: Any = None
        """Tokens of the last call, where the next one may show that they were a prompt growing without a cache."""
        self.memo: dict[Any, Any] | None = None
        """What pages keep from one step of cached decoding to the next, see `memo`; None where nothing may be kept."""
        self.decoding: Any = None
        """(weak reference to the key-value cache that is being continued, its memo)."""
        self.pending: list[Any] = []
        """Selections under which checkpointed forwards ran and wait for their recomputation."""
        self.pending_done = False
        self.compiled_checkpoint = False
        """A compiler traced a hook inside a checkpoint."""
        self.compiled_checkpoint_noted = False
        self.scope_thread: int | None = None
        self.scope_depth = 0

    def __getstate__(self) -> dict[str, Any]:
        # a copy is in no call and no scope of the original
        kept = ("records", "active", "row_epoch", "base_trainable", "merged", "vocabulary")
        return {**ModelState().__dict__, **{k: self.__dict__[k] for k in kept}}


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif (
            type(model).__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
            and "module" in model._modules
        ):
            model = model._modules["module"]  # type: ignore[assignment]
        else:
            return model


def state_of(model: nn.Module, create: bool = False) -> ModelState:
    """The model's adapter state; raises `StateError` when it has none."""
    model = unwrap(model)
    state = model.__dict__.get(STATE)
    if state is None:
        if not create:
            raise StateError("the model has no adapter. Attach one with ll.attach(model, cfg) or ll.load(model, path).")
        return ModelState()
    return state


def outside_scope(state: ModelState, what: str) -> None:
    """Raise inside a `with ll.active(...)` or `with ll.rows(...)` block, whose end would undo or contradict the change."""
    if state.scope_depth:
        raise SelectionError(
            f"{what} inside a `with ll.active(...)` or `with ll.rows(...)` block would be undone at its end; leave the block first."
        )


def record_of(model: nn.Module, name: str | None = None) -> Record:
    """The adapter called `name`; None means the only one attached, or the only active one."""
    state = state_of(model)
    if name is None:
        names = list(state.records) if len(state.records) == 1 else [n for n, _ in state.active]
        if len(names) != 1:
            raise StateError(f"name the adapter: name=..., one of {list(state.records)}.")
        name = names[0]
    if name not in state.records:
        raise StateError(
            f"no adapter is called {name!r}.{did_you_mean(name, state.records)} Attached: {list(state.records)}."
        )
    return state.records[name]


def stored_name(short: str, adapter: str) -> str:
    """Attribute under which a layer stores an adapter's tensor: `lora_A`, or `lora_A@name` for any but `default`."""
    return short if adapter == DEFAULT else f"{short}@{adapter}"


def adapter_attributes(module: nn.Module) -> set[str]:
    """The attributes of a layer that hold tensors of adapters."""
    site: Site | None = module.__dict__.get(SITE)
    return set() if site is None else {a for slot in site.slots.values() for a in slot.keys.values()}


def tensor_on(module: nn.Module, attribute: str) -> Tensor | None:
    """A parameter or buffer of this module by its attribute name."""
    found = module._parameters.get(attribute)
    return found if found is not None else module._buffers.get(attribute)


def owned_tensors(model: nn.Module, record: Record) -> Iterator[tuple[Target, str, nn.Module, Tensor]]:
    """(target, short name, layer, tensor) of everything an adapter owns, shared tensors once."""
    model = unwrap(model)
    for target in record.targets.values():
        layer = model.get_submodule(target.path)
        for short in target.specs:
            tensor = tensor_on(layer, stored_name(short, record.name))
            if tensor is None:
                raise StateError(
                    f"adapter {record.name!r}: {target.path}.{stored_name(short, record.name)} is gone; something replaced the layer "
                    "or deleted its parameters. Detach and load the adapter again."
                )
            yield target, short, layer, tensor


def reset_compiled() -> None:
    """Forget compiled code: torch does not guard on added or removed hooks."""
    import sys

    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
