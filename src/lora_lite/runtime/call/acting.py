"""Attached means acting: an adapted layer that was replaced, or whose weight other code reads past its hooks, is
named."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..._torch import end_mode, is_fake, makes_fakes, runs_compiled, within_compiled
from ...core.errors import LoraLiteWarning, StateError, listing
from ..layers.kinds import kind_of
from ..layers.tensors import is_sharded
from ..model.call import Links
from ..model.held import Seen, look
from ..model.record import Record
from ..model.site import Site
from ..model.state import SITE, STATE, Form, ModelState, acting_names

Step = tuple[nn.Module, str, nn.Module]
LOOKUPS = (F.embedding, torch.embedding, F.embedding_bag)
ASKS = ("to", "type_as")
"""Functions that take the second tensor's dtype and device, not its values."""
FORMS = 8
"""Forms of calls that are listened to."""


def begin(model: nn.Module, state: ModelState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a whole call: are the adapted layers still there, did they act so far; and listen to the first call of
    each form, in training and in evaluation: with labels a model may take another way than without.

    Raises:
        StateError: a layer was replaced; or the second training call begins, and other code reads an adapted weight
            past its hooks.
        TargetError: a layer that had no values at attach is not what it seems.
    """
    if not (state.active or state.rows) or getattr(model, "_is_replica", False):  # DataParallel's copies
        return
    names, now = acting_names(state), state.here.now
    _check_present(model, state, names)
    training = now.grad and model.training
    if training:
        state.train_calls += 1
        _check_trained(model, state, names)
    form = training, len(args), frozenset(key for key, value in kwargs.items() if value is not None)
    if form in state.unhooked or len(state.unhooked) >= FORMS:
        return
    if _may_listen(state) and not _is_compiled(model) and not makes_fakes():
        _listen(model, state, form)


def _check_trained(model: nn.Module, state: ModelState, names: Iterable[str]) -> None:
    """Raise where a training call before this one read an adapted weight past its hooks, while other layers ran."""
    idle = any(paths for (training, *_), paths in state.unhooked.items() if training)
    if idle and any(site.ran for site in _sites(model, state)):
        for name in names:
            check_acts(state, state.records[name], "it would not be trained there")


def end(model: nn.Module, state: ModelState, failed: bool) -> list[str]:
    """After it, an exception included: stop listening; the targets whose weights other code read instead of calling
    them."""
    watch: Watch | None = state.watch
    if watch is None or watch.thread != get_ident():
        return []
    _stop_listening(state)
    if failed:
        return []
    if watch.buffers:
        _watch_buffers(watch.buffers, look(model))
    state.unhooked[watch.form] = paths = [path for path in watch.read if path not in watch.ran]
    return paths


def tell(paths: list[str]) -> None:
    """Say that these targets do nothing."""
    if paths:
        warnings.warn(_unhooked_text(paths, "the adapter does nothing there"), LoraLiteWarning, stacklevel=4)


def _watch_buffers(before: Seen, after: Seen) -> None:
    moved = [path for path, seen in after.items() if before.get(path, seen) != seen]
    if moved:
        owner = moved[0].rpartition(".")[0]
        warnings.warn(
            f"{listing(moved)} moved in a training call: state of the base that no adapter's file holds, so a loaded "
            "adapter is not what was trained, and ll.detach does not give it back. Keep it still, after each "
            f"model.train(): model.get_submodule({owner!r}).eval()",
            LoraLiteWarning,
            stacklevel=5,
        )


def _may_listen(state: ModelState) -> bool:
    """Not while another thread's call is listened to; what a call left that was interrupted goes."""
    watch: Watch | None = state.watch
    if watch is not None and watch.thread == get_ident():
        _stop_listening(state)
    return state.watch is None


def _listen(model: nn.Module, state: ModelState, form: Form) -> None:
    _inspect(model, state)
    for site in _sites(model, state):
        site.awaited = True
    state.watch = watch = Watch(model, state, form)
    watch.__enter__()


def _stop_listening(state: ModelState) -> None:
    watch, state.watch = state.watch, None
    end_mode(watch)


def note_run(site: Site) -> None:
    """An awaited layer's hook runs. It is awaited on where no gradient reaches it yet, in a call that has one."""
    state, now = site.state, site.state.here.now
    site.ran, site.awaited = True, now.grad and not torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        return
    if not site.awaited:
        now.fed.add(site.path)
    if state.watch is not None:
        state.watch.ran.add(site.path)


def check_acts(state: ModelState, record: Record, consequence: str) -> None:
    """Raise where the weight of an adapter's target was read past its hooks.

    Raises:
        StateError: with the targets' names.
    """
    if why := why_unhooked(state, list(record.targets), consequence):
        raise StateError(f"adapter {record.name!r}: {why}")


def why_unhooked(state: ModelState, paths: list[str], consequence: str) -> str:
    """The sentence about those of these layers whose weight was read past their hooks; empty where none was."""
    read = {path for of_mode in state.unhooked.values() for path in of_mode}
    found = [path for path in paths if path in read]
    return _unhooked_text(found, consequence) if found else ""


def warn_idle(model: nn.Module, record: Record) -> None:
    """Before a file is written: name the targets whose weight was read past their hooks, and those that never ran in
    training while others did. Their tensors are what they were at the start."""
    state: ModelState = model.__dict__[STATE]
    if why := why_unhooked(state, list(record.targets), "what is saved of the adapter there does nothing"):
        warnings.warn(f"adapter {record.name!r}: {why}", LoraLiteWarning, stacklevel=3)
        return
    sites = {site.path: site for site in _sites(model, state)}
    idle = [path for path in record.targets if path in sites and not sites[path].ran]
    if not idle or not state.train_calls or len(idle) == len(record.targets) or _is_compiled(model):
        return
    warnings.warn(
        f"adapter {record.name!r}: {listing(idle)} never ran as modules in training, so what is saved of them is how "
        "they started. Leave out what the model does not call: exclude_names.",
        LoraLiteWarning,
        stacklevel=3,
    )


def _unhooked_text(paths: list[str], consequence: str) -> str:
    names = sorted({path.rsplit(".", 1)[-1] for path in paths})
    return (
        f"{listing(paths)} {'was' if len(paths) == 1 else 'were'} never called as a module: other code read the weight "
        f"(a function or a fused kernel), and {consequence}. Attach without: exclude_names="
        f"({', '.join(map(repr, names))},)."
    )


def _sites(model: nn.Module, state: ModelState) -> Iterator[Site]:
    return (site for m in model.modules() if (site := m.__dict__.get(SITE)) is not None and site.state is state)


def _is_compiled(model: nn.Module) -> bool:
    """Whether parts of it run as compiled code, in which no hook can say that it ran."""
    return any(runs_compiled(m) for m in model.modules())


def _check_present(model: nn.Module, state: ModelState, names: Iterable[str]) -> None:
    """Raise where a layer with one of these adapters is no part of the model any more."""
    links = state.links
    if links is None or not links.hold():
        state.links = links = _links(model, state)
    for name in names if links.lost else ():
        gone = [path for path in state.records[name].targets if path in links.lost]
        if gone:
            raise StateError(
                f"adapter {name!r}: {listing(gone)} {'was' if len(gone) == 1 else 'were'} replaced after the adapter "
                "was attached, and the new layers would run without it. Merge first (ll.merge), or convert, fuse or "
                f"swap layers first and attach afterwards: ll.detach(model, {name!r}), then ll.attach or ll.load."
            )


def _links(model: nn.Module, state: ModelState) -> Links:
    """The ways to every adapted layer, through whatever was wrapped around it since."""
    modules = dict(model.named_modules())
    found: dict[str, Site] = {}
    steps: dict[str, Step] = {}
    for path, module in modules.items():
        site: Site | None = module.__dict__.get(SITE)
        if site is None or site.state is not state:
            continue
        found[site.path] = site
        while path and path not in steps:
            above, _, name = path.rpartition(".")
            steps[path] = modules[above], name, modules[path]
            path = above
    lost = {path for record in state.records.values() for path in record.targets if path not in found}
    return Links(list(steps.values()), lost)


def _inspect(model: nn.Module, state: ModelState) -> None:
    """Try the layers that had no values when they were adapted."""
    for module in model.modules():
        site: Site | None = module.__dict__.get(SITE)
        if site is not None and site.state is state and not site.inspected and _has_values(module):
            site.found, site.inspected = site.kind.inspect(module, site.path), True


def _has_values(module: nn.Module) -> bool:
    return not any(p.is_meta or is_fake(p) for p in module.parameters(recurse=False))


class Watch(TorchFunctionMode):
    """Notes which adapted layers' weights go into a function of torch, and which layers' hooks run."""

    def __init__(self, model: nn.Module, state: ModelState, form: Form) -> None:
        super().__init__()
        self.form, self.thread = form, get_ident()
        trained_before = any(training for training, *_ in state.unhooked)
        self.buffers = look(model) if form[0] and not trained_before else {}
        self.read: dict[str, None] = {}
        self.ran: set[str] = set()
        self.weights = {id(w): site for site, w in _weights(model, state)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not torch.compiler.is_compiling():
            self.note(func, args, kwargs or {}, out)
        return out

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        for i, t in enumerate((*args, *kwargs.values())):
            site = self.weights.get(id(t))
            if site is None or site.path in self.ran or not _takes_values(func, i, out):
                continue
            looked_up = func in LOOKUPS  # a tied weight is multiplied by the head, and looked up by the embedding
            if looked_up == site.kind.by_number and not within_compiled():
                self.read[site.path] = None


def _weights(model: nn.Module, state: ModelState) -> Iterator[tuple[Site, Tensor]]:
    """(site, weight) of adapted layers, without those that another layer of their kind uses as well."""
    users: dict[int, list[bool]] = {}
    for module in model.modules():
        kind = kind_of(module)
        users.setdefault(id(module._parameters.get("weight")), []).append(kind is not None and kind.by_number)
    for module in model.modules():
        site, w = module.__dict__.get(SITE), getattr(module, "weight", None)
        if site is None or site.state is not state or not isinstance(w, Tensor) or is_sharded(w):
            continue
        if users.get(id(w), []).count(site.kind.by_number) <= 1:
            yield site, w


def _takes_values(func: Any, position: int, out: Any) -> bool:
    """Whether a function uses more of its argument than shape, dtype and device."""
    name = getattr(func, "__name__", "")
    if name == "data_ptr":  # a kernel gets an address
        return True
    if name.endswith("_like") or name.startswith("new_") or (name in ASKS and position > 0):
        return False
    return isinstance(out, Tensor) or (isinstance(out, (tuple, list)) and any(isinstance(v, Tensor) for v in out))
