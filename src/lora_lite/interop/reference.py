"""The reference model of DPO, KTO, GRPO, RLOO and their kin: the model in training with its adapters as they were, so
that no second base is in memory."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import lora_lite as ll

from ..core.errors import FileError, StateError
from ..io import native
from ..io.load import adapter_file
from ..runtime.call.batch import evaluating
from ..runtime.model.site import owned_tensors
from ..runtime.model.state import record_of, state_of
from ..runtime.twin import frozen_copy
from .folder import write
from .homes import homes

SUFFIX = "-reference"
"""What is appended to an adapter's name for its frozen copy."""
FOLDER = "reference"
"""Where a checkpoint keeps the frozen copies."""


class Copy(NamedTuple):
    """A frozen copy, and what it was copied from."""

    home: nn.Module
    original: str
    name: str


class Reference(nn.Module):
    """Stands where a trainer expects a reference model. Calling it calls the policy without gradients and in eval mode,
    each trainable adapter replaced by a frozen copy of what it was, or by nothing where the trainer attached it."""

    def __init__(self) -> None:
        super().__init__()
        # plain attributes: it owns no parameters, so that nobody shards, casts or counts the base again
        self.__dict__.update(_policy=None, _selections=[], copies=list[Copy]())

    def follow(self, policy: nn.Module, fresh: bool) -> None:
        """Measure from the policy as it is now, or from its base where its adapter is `fresh`."""
        selections: list[tuple[nn.Module, dict[str, float]]] = []
        copies: list[Copy] = []
        for home in homes(policy):
            handles, chosen = ll.adapters(home), dict[str, float]()
            for name, weight in state_of(home).active:
                if not handles[name].trainable:
                    chosen[name] = weight
                elif not fresh:
                    copies.append(Copy(home, name, _copied(home, name)))
                    chosen[copies[-1].name] = weight
            selections.append((home, chosen))
        self.__dict__.update(_policy=policy, _selections=selections, copies=copies)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        policy = self.__dict__["_policy"]
        if policy is None:
            raise StateError("the reference follows no model yet; the trainer binds it while it is constructed.")
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluating(policy))
            for home, chosen in self.__dict__["_selections"]:
                stack.enter_context(ll.active(home, chosen))
            return policy(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As a call; trainers and accelerate put wrappers of their own around it, which the policy has already."""
        return self(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The policy's, frozen copies included: TRL hashes it to know its cached log-probabilities again."""
        return self.__dict__["_policy"].state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self.__dict__.get("_policy") is None:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return getattr(self.__dict__["_policy"], name)

    @torch.no_grad()
    def move(self, rate: float) -> None:
        """Move every frozen copy towards its original: (1 - rate) copy + rate original, tensor by tensor."""
        for home, original, name in self.copies:
            now = dict(_tensors(home, original))
            for key, tensor in _tensors(home, name):
                tensor.lerp_(now[key], rate) if tensor.is_floating_point() else tensor.copy_(now[key])

    def save(self, folder: Path, writer: bool = True) -> None:
        """Write the frozen copies into a checkpoint; every process of a sharded run must call it."""
        for home, original, name in self.copies:
            write(home, name, folder / FOLDER / adapter_file(original), compact=False, writer=writer)

    def load(self, folder: Path) -> None:
        """Take the frozen copies from a checkpoint.

        Raises:
            FileError: the run that wrote it measured from something else.
        """
        paths = {folder / FOLDER / adapter_file(copy.original): copy for copy in self.copies}
        there = set((folder / FOLDER).glob("*.safetensors"))
        if there != set(paths):
            cure = (
                f"begin with ll.load(model, {str(folder / FOLDER)!r}, trainable=True)"
                if there
                else "let the trainer attach a fresh adapter: ll.trainer(TrainerClass, cfg)"
            )
            raise FileError(
                f"the run that wrote {folder} measured from {'another adapter' if there else 'the bare base'}, so it "
                f"cannot go on here; {cure}, and resume then."
            )
        for path, copy in paths.items():
            ll.load_adapter_state_dict(copy.home, copy.name, native.read(path)[1])


def _tensors(home: nn.Module, name: str) -> Iterator[tuple[tuple[str, str], torch.Tensor]]:
    """((path, tensor's name in the page), tensor) of an adapter."""
    for target, short, _, tensor in owned_tensors(home, record_of(home, name)):
        yield (target.path, short), tensor


def _copied(home: nn.Module, name: str) -> str:
    """Copy an adapter; a copy that an earlier trainer left goes."""
    old = ll.adapters(home).get(name + SUFFIX)
    if old is not None and not old.trainable:
        ll.detach(home, old.name)
    return frozen_copy(home, name, name + SUFFIX).name


def parameters(trainer: type) -> Mapping[str, inspect.Parameter]:
    """What a trainer class is constructed with; where its own `__init__` takes `*args`, what the next one names."""
    unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = [inspect.signature(init).parameters for init in _inits(trainer)]
    return next((named for named in found if any(p.kind not in unnamed for p in list(named.values())[1:])), found[0])


def said(trainer: type, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Argument's name -> value, of a call that constructs a trainer."""
    signature = inspect.Signature(list(parameters(trainer).values()))
    return signature.bind_partial(None, model, *args, **kwargs).arguments


def way(trainer: type, args: Any) -> str:
    """How a trainer class takes its reference: "argument"; "beta" where it makes one itself unless the KL factor of
    that name is 0; "teacher" where it makes one as a teacher; "attribute" where it makes one whatever is said; or ""
    where it has none."""
    if "ref_model" in parameters(trainer):
        return "argument"
    if hasattr(trainer, "_setup_teacher_model"):
        return "teacher"
    if not any("ref_model" in init.__code__.co_names for init in _inits(trainer) if hasattr(init, "__code__")):
        return ""
    if args is not None and not hasattr(args, "beta"):
        return "attribute"
    return "beta" if args is None or args.beta else ""


def _inits(trainer: type) -> list[Any]:
    return [inspect.unwrap(vars(c)["__init__"]) for c in trainer.__mro__ if "__init__" in vars(c) and c is not object]


def averaging(reference: Reference, rate: float, every: int) -> Any:
    """A callback that moves the frozen copies towards the adapters by this rate, after every so many steps."""
    from transformers import TrainerCallback

    class Averaging(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % every == 0:
                reference.move(rate)

    return Averaging()


def check_arguments(args: Any, model: nn.Module) -> None:
    """Raise where the trainer's arguments contradict a reference that shares the base.

    Raises:
        StateError: the reference should follow the policy, or dropout is said to be off and an adapter has its own.
    """
    if getattr(args, "sync_ref_model", False):
        raise StateError(
            "sync_ref_model=True moves a second model after the first; here the reference is a frozen copy of the "
            "adapter on the same base. Leave it out, or give a model of its own: ref_model=..."
        )
    dropping = [h.name for home in homes(model) for h in ll.adapters(home).values() if h.trainable and h.cfg.dropout]
    if getattr(args, "disable_dropout", False) and dropping:
        raise StateError(
            f"adapter {dropping[0]!r} has a dropout, which disable_dropout=True of the arguments cannot reach. Attach "
            "it with dropout=0, or set disable_dropout=False."
        )
