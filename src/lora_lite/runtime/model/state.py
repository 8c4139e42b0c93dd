"""What the model remembers of its adapters: plain data on the root module, no references to modules, so it survives
deepcopy and pickle."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError, SelectionError, StateError, did_you_mean
from .call import Begun, Call, Chosen, Links, Memo, Prompt, RowGroup, Rows, Selection
from .merged import Merged
from .record import Record

STATE, SITE = "_lora_lite_state", "_lora_lite_site"
DEFAULT = "default"


class ModelState:
    """All adapters of one model, and which of them act."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.active: Chosen = ()
        self.rows: Rows | None = None
        self.row_cache: dict[tuple[Rows, int, torch.device], dict[str, RowGroup]] = {}
        """Index tensors of recent row selections."""
        self.row_epoch = 0
        """Counts `ll.rows` blocks: what one of them stacked is not used by the next."""
        self.base_trainable: list[str] = []
        """Base parameters that required a gradient before the first attach; detach gives it back."""
        self.held: list[str] = []
        """Paths of the norms whose running figures are held, see `held`."""
        self.merged: Merged | None = None
        self.vocabulary: dict[str, int] = {}
        """Rows of the adapted embeddings and heads when they were adapted, see `call.vocabulary`."""
        self.batch: int | None = None
        """Batch size of the running root call."""
        self.in_call = False
        """A call of the whole model is running."""
        self.call_grad = False
        """Whether the running root call was entered with gradients enabled."""
        self.gradless: dict[str, bool | None] = {}
        """Paths of layers that ran without a gradient in a training call -> whether a reentrant checkpoint cut it off
        there; None: the model's own `no_grad`, see `call.recompute`."""
        self.newly_gradless: list[str] = []
        """Those of them that were seen first in the present root call."""
        self.fed: set[str] = set()
        """Paths of awaited layers that ran with a gradient in the present root call."""
        self.cut_noted = False
        """Whether the model's own `no_grad` was warned about."""
        self.prompt: Prompt | None = None
        """What `ll.prompt` says, see `call.positions`."""
        self.context: dict[str, Tensor] = {}
        """What `ll.context` says."""
        self.call: Call | None = None
        """What the running root call has of its own, where an adapter asks for it."""
        self.previous: Tensor | None = None
        """Tokens of the last call, where the next one may show that they were a prompt growing without a cache."""
        self.begun: dict[str, Begun] = {}
        """Wording of positions -> what its last call left for one that continues the same cache."""
        self.memo: Memo | None = None
        """What pages keep from one step of cached decoding to the next, see `view.kept`; None where nothing may be
        kept."""
        self.decoding: tuple[weakref.ref[object], Memo] | None = None
        """(weak reference to the key-value cache that is being continued, its memo)."""
        self.pending: list[Selection] = []
        """Selections under which checkpointed forwards ran and wait for their recomputation."""
        self.pending_done = False
        self.compiled_checkpoint = False
        """A compiler traced a hook inside a checkpoint."""
        self.compiled_checkpoint_noted = False
        self.links: Links | None = None
        """The ways from the model down to its adapted layers, see `call.acting`."""
        self.watch: Any = None
        """What listens to the running call, see `call.acting`."""
        self.unhooked: dict[bool, list[str]] = {}
        """Training or not -> paths of adapted layers that did not run in the first such call since an adapter was
        added, while other code read their weight."""
        self.train_calls = 0
        """Training calls since."""
        self.scope_thread: int | None = None
        self.scope_depth = 0

    def __getstate__(self) -> dict[str, object]:
        # a copy is in no call and no scope of the original
        kept = ("records", "active", "row_epoch", "base_trainable", "held", "merged", "vocabulary")
        return {**ModelState().__dict__, **{k: self.__dict__[k] for k in kept}}


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


def outside_scope(state: ModelState, what: str) -> None:
    """Raise inside a `with ll.active(...)` or `with ll.rows(...)` block, whose end would undo or contradict the
    change."""
    if state.scope_depth:
        raise SelectionError(
            f"{what} inside a `with ll.active(...)` or `with ll.rows(...)` block would be undone at its end; leave "
            "the block first."
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
