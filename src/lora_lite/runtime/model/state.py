"""What the model remembers of its adapters: plain data on the root module, no references to modules, so it survives
deepcopy and pickle."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..._torch import guard_hooks, modules_called_elsewhere
from ...core.errors import ConfigError, SelectionError, StateError, did_you_mean
from .call import Begun, Chosen, Links, Names, PerThread, RowGroup, Rows, Running, Said, Traced, is_one, is_zero
from .merged import Merged
from .record import Record

STATE, SITE = "_lora_lite_state", "_lora_lite_site"
DEFAULT = "default"
Form = tuple[bool, int, frozenset[str]]
"""Of a call: in training or not, the number of positional arguments, the names of the others that are not None."""
WRAPPED = "module"
"""Under this name torch's wrappers of data-parallel training keep the model."""


class ModelState:
    """All adapters of one model, and which of them act."""

    def __init__(self) -> None:
        guard_hooks()
        self.records: dict[str, Record] = {}
        self.own: tuple[str, ...] = ()
        """The model's own parameters before it was adapted, by attribute; not those of modules inside."""
        self.selected: tuple[Chosen, Rows | None] = (), None
        """What acts on the next call: adapters, or one per row. One attribute, so that a call in another thread reads
        both at once."""
        self.traced: tuple[Traced, Rows | None] = (), None
        """The same as a compiler sees it."""
        self.here = PerThread()
        """What each thread knows of the call that it runs."""
        self.row_cache: dict[tuple[Names, int, torch.device], dict[str, RowGroup]] = {}
        """Index tensors of recent row selections."""
        self.row_epoch = 0
        """Counts changes of the adapters, and of the rows from one `ll.rows` block to the next: what was stacked before
        is not used afterwards."""
        self.row_block = 0
        """Counts `ll.rows` blocks."""
        self.last_rows: Rows | None = None
        """The rows of the last block."""
        self.base_trainable: list[str] = []
        """Base parameters that required a gradient before the first attach; detach gives it back."""
        self.held: list[str] = []
        """Paths of the norms whose running figures are held, see `held`."""
        self.parameters: tuple[str, ...] = ()
        """Names of the parameters of the model's forward."""
        self.merged: Merged | None = None
        self.vocabulary: dict[str, int] = {}
        """Rows of the adapted embeddings and heads when they were adapted, see `call.vocabulary`."""
        self.said: dict[int, Said] = {}
        """Thread -> what its `with ll.prompt(...)` and `with ll.context(...)` blocks say."""
        self.begun: dict[tuple[str, int], Begun] = {}
        """(wording of positions, cache) -> what the last call left for one that continues that cache."""
        self.waiting: weakref.WeakSet[Running] = weakref.WeakSet()
        """Threads with selections that wait for a recomputation, which the autograd engine may run in a thread of its
        own."""
        self.gradless: dict[str, bool | None] = {}
        """Paths of layers that ran without a gradient in a training call -> whether a reentrant checkpoint cut it off
        there; None: the model's own `no_grad`, see `call.recompute`."""
        self.cut_noted = False
        """Whether the model's own `no_grad` was warned about."""
        self.compiled_checkpoint = False
        """A compiler traced a hook inside a checkpoint."""
        self.compiled_checkpoint_noted = False
        self.links: Links | None = None
        """The ways from the model down to its adapted layers, see `call.acting`."""
        self.watch: Any = None
        """What listens to a running call, of one thread at a time, see `call.acting`."""
        self.unhooked: dict[Form, list[str]] = {}
        """Form -> paths of adapted layers that did not run in the first such call since an adapter was added, while
        other code read their weight."""
        self.train_calls = 0
        """Training calls since."""
        self.scope_thread: int | None = None
        self.scope_depth = 0
        self.changing: int | None = None
        """The thread that is changing adapters; calls in other threads wait for it."""

    @property
    def active(self) -> Chosen:
        """The adapters that act on the next call."""
        return self.selected[0]

    @property
    def rows(self) -> Rows | None:
        """One adapter per row of the next call, inside a `with ll.rows(...)` block."""
        return self.selected[1]

    def select(self, active: Chosen, rows: Rows | None = None) -> None:
        """Choose what acts from now on, in the rest of this thread's own call too."""
        now = self.here.now
        if now.selection is not None:
            now.selection = (active, rows, *now.selection[2:])
        self.put((active, rows))

    def put(self, selected: tuple[Chosen, Rows | None]) -> None:
        """Let this act on the next call."""
        self.selected = selected
        self.traced = tuple((name, self._traced(name, weight)) for name, weight in selected[0]), selected[1]

    def _traced(self, name: str, weight: float) -> float | Tensor:
        """A weight as a tensor, so that other values need no other graph; but 1, which costs nothing, and 0 stay what
        they are, and so does one that a page reads as a number."""
        record = self.records.get(name)
        if is_one(weight) or is_zero(weight) or record is None or record.variant.own_weight:
            return weight
        with torch.inference_mode(False):
            return torch.tensor(weight, dtype=torch.float64, device="cpu")

    def choice(self) -> tuple[Chosen, Rows | None]:
        """What acts on the next call, for code that a compiler follows too."""
        return cast("Any", self.traced) if torch.compiler.is_dynamo_compiling() else self.selected

    def said_here(self) -> Said:
        """What this thread's blocks say, or those of the one thread that has any, as around a thread that generates."""
        if self.here.now.said is not None or not self.said:
            return self.here.now.said or Said()
        if len(self.said) > 1:
            raise SelectionError(
                "several threads are inside a `with ll.prompt(...)` or `with ll.context(...)` block of this model, and "
                "this one is not: which of them is meant cannot be told. Open the block in the thread that calls the "
                "model."
            )
        return next(iter(self.said.values()))

    def __getstate__(self) -> dict[str, object]:
        # a copy is in no call and no scope of the original
        kept = ("records", "own", "row_epoch", "base_trainable", "held", "parameters", "merged", "vocabulary")
        return {**{k: self.__dict__[k] for k in kept}, "selected": (self.active, None)}

    def __setstate__(self, data: dict[str, object]) -> None:
        self.__init__()
        self.__dict__.update(data)
        self.put(self.selected)


def acting_names(state: ModelState) -> dict[str, None]:
    """The adapters that act on the next call, or on some row of it."""
    rows = () if state.rows is None else state.rows.names
    return dict.fromkeys((*(name for name, _ in state.active), *(name for name in rows if name is not None)))


def check_module(model: object) -> None:
    """Refuse a tokenizer, a config, swapped arguments: every public entry comes through here.

    Raises:
        ConfigError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"the first argument is the model, a torch.nn.Module, got {type(model).__name__}; the order is "
            "ll.attach(model, cfg), ll.load(model, path)."
        )


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside torch.compile's and DistributedDataParallel's wrappers; what is no module raises."""
    check_module(model)
    while True:
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif (
            type(model).__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
            and WRAPPED in model._modules
        ):
            model = model._modules[WRAPPED]  # type: ignore[assignment]
        else:
            return model


def state_of(model: nn.Module, create: bool = False) -> ModelState:
    """The model's adapter state; raises `StateError` when it has none."""
    model = unwrap(model)
    state = model.__dict__.get(STATE)
    if state is None:
        if not create:
            raise StateError(f"the model has no adapter.{_inside(model)}")
        return ModelState()
    return state


def _inside(model: nn.Module) -> str:
    """What to type instead, where a module inside has one or none does."""
    path = next((path for path, module in model.named_modules() if STATE in module.__dict__), None)
    if path is None:
        return " Attach one with ll.attach(model, cfg) or ll.load(model, path)."
    return f" The module inside it has: give model.get_submodule({path!r})."


def not_merged(state: ModelState, what: str) -> None:
    """Raise while adapters are merged into the weights."""
    if state.merged is not None:
        raise StateError(f"the model is merged; call ll.unmerge(model) before {what}.")


def outside_calls(model: nn.Module, what: str) -> None:
    """Raise inside a `with ll.active(...)` or `with ll.rows(...)` block, whose end would undo or contradict the change,
    and while another thread runs a call of the model, which would be half of one kind and half of another."""
    state: ModelState | None = model.__dict__.get(STATE)
    if state is not None and state.scope_depth:
        raise SelectionError(
            f"{what} inside a `with ll.active(...)` or `with ll.rows(...)` block would be undone at its end; leave "
            "the block first."
        )
    not_called_elsewhere(model, what)


def not_called_elsewhere(model: nn.Module, what: str) -> None:
    """Raise while another thread runs a call of the model."""
    if any(unwrap(m) is model for m in modules_called_elsewhere()):
        raise SelectionError(
            f"{what} while another thread runs a call of this model would change it half way. Wait until that call "
            "has returned: join the thread, or hold one lock around the calls and around this."
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
