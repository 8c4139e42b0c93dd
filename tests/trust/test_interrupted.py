"""A verb that is interrupted, at whatever line of it, has not happened, and can be called again. Only `unmerge` goes on
to its end, since the merged bits are kept nowhere."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import Snapshot, batches, toy

PACKAGE = str(Path(ll.__file__).parent)
X = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))


class Interrupted(BaseException):
    """What a signal raises: no `except Exception` sees it."""


class At:
    """Inside, the n-th line of the package's own code raises; 0 only counts."""

    def __init__(self, n: int) -> None:
        self.n, self.lines, self.where = n, 0, ""

    def __enter__(self) -> At:
        self.before = sys.gettrace()
        sys.settrace(self.call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def call(self, frame, event, arg):
        name = frame.f_code.co_filename
        return self.line if name.startswith(PACKAGE) and "testing" not in name else None

    def line(self, frame, event, arg):
        if event == "line":
            self.lines += 1
            if self.lines == self.n:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
                sys.settrace(None)
                raise Interrupted
        return self.line


def bare(folder: Path) -> nn.Module:
    model = toy().train()
    model.layers[0].eval()
    model.head.weight.requires_grad_(False)
    return model


def adapted(folder: Path, method: str = "lora") -> nn.Module:
    model = bare(folder)
    for i, name in enumerate(("default", "other")):
        ll.attach(model, ll.get_variant(method).config(variant=method, r=4, alpha=7.0), name=name)
        randomise(model, name, seed=i)
    ll.activate(model, ["default", "other"])
    return model


def nested(folder: Path) -> nn.Module:
    return adapted(folder, "dylora")


def gated(folder: Path) -> nn.Module:
    model = bare(folder)
    ll.attach(model, ll.HRAConfig(r=2))
    randomise(model)
    return model


def merged(folder: Path) -> nn.Module:
    model = adapted(folder)
    ll.merge(model)
    return model


def cast(folder: Path) -> nn.Module:
    return adapted(folder).to(torch.float64)


def scheduled(folder: Path) -> nn.Module:
    model = bare(folder)
    ll.attach(model, ll.AdaLoRAConfig(r=3, target_r=2))
    return model


def freeze(model: nn.Module) -> None:
    ll.adapters(model)["default"].trainable = False


def within(scope: Callable[[nn.Module], object]) -> Callable[[nn.Module], object]:
    """Enters and leaves a block."""

    @contextmanager
    def both(model: nn.Module) -> Iterator[None]:
        with scope(model):  # type: ignore[attr-defined]
            yield

    def act(model: nn.Module) -> None:
        with both(model):
            pass

    return act


def schedule(model: nn.Module) -> None:
    ll.schedule(model, torch.optim.SGD(ll.adapters(model)["default"].parameters(), lr=0.1), 9)


class Verb(NamedTuple):
    make: Callable[[Path], nn.Module]
    act: Callable[[nn.Module, Path], object]
    ends: bool = False
    """An interruption may find it at its end: its change is one step of the system, or it goes on to its end."""


EVA = ll.EVAConfig(r=2, alpha=5)
VERBS: dict[str, Verb] = {
    "attach": Verb(bare, lambda m, f: ll.attach(m, ll.LoRAConfig(r=3, alpha=7))),
    "attach a second": Verb(adapted, lambda m, f: ll.attach(m, ll.DoRAConfig(r=3, alpha=7), name="third")),
    "attach from data": Verb(adapted, lambda m, f: ll.attach(m, EVA, [b["x"] for b in batches(n=1)], name="third")),
    "load": Verb(bare, lambda m, f: ll.load(m, f / "file.safetensors")),
    "load a folder": Verb(bare, lambda m, f: ll.load(m, f / "folder")),
    "save": Verb(adapted, lambda m, f: ll.save(m, f / "other.safetensors", name="other"), True),
    "export": Verb(adapted, lambda m, f: ll.export(m, f / "folder", name="other"), True),
    "detach one": Verb(adapted, lambda m, f: ll.detach(m, "default")),
    "detach all": Verb(adapted, lambda m, f: ll.detach(m)),
    "rename": Verb(adapted, lambda m, f: ll.rename(m, "default", "new")),
    "activate": Verb(adapted, lambda m, f: ll.activate(m, {"other": 0.5})),
    "active": Verb(adapted, lambda m, f: within(lambda n: ll.active(n, "other"))(m)),
    "rows": Verb(adapted, lambda m, f: within(lambda n: ll.rows(n, ["other", None], owners={"head|up": [0]}))(m)),
    "prompt": Verb(adapted, lambda m, f: within(lambda n: ll.prompt(n, [2, 1]))(m)),
    "context": Verb(adapted, lambda m, f: within(lambda n: ll.context(n, task_ids=[2, 1]))(m)),
    "compact": Verb(nested, lambda m, f: ll.compact(m, "default", rank=2)),
    "combine": Verb(adapted, lambda m, f: ll.combine(m, {"default": 0.5, "other": -2.0}, name="sum")),
    "merge": Verb(adapted, lambda m, f: ll.merge(m, check=X)),
    "merge a rotation": Verb(gated, lambda m, f: ll.merge(m)),
    "merge_and_unload": Verb(adapted, lambda m, f: ll.merge_and_unload(m, "other")),
    "unmerge": Verb(merged, lambda m, f: ll.unmerge(m), True),
    "trainable": Verb(adapted, lambda m, f: freeze(m)),
    "restore_dtype": Verb(cast, lambda m, f: ll.adapters(m)["other"].restore_dtype()),
    "load_adapter_state_dict": Verb(
        adapted, lambda m, f: ll.load_adapter_state_dict(m, "other", ll.adapter_state_dict(m, "default"))
    ),
    "schedule": Verb(scheduled, lambda m, f: schedule(m)),
}


def facts(model: nn.Module, folder: Path) -> tuple[object, ...]:
    """What a verb changes and a snapshot does not see: adapters in their order, who acts, files."""
    state = model.__dict__.get("_lora_lite_state")
    selected = None
    if state is not None:
        now = state.here.now
        selected = state.selected, state.scope_depth, state.changing, state.merged is None, dict(state.said), now.said
        selected = *selected, now.selection, {n: vars(r) for n, r in state.records.items()}
    handles = {n: (a.active, a.trainable) for n, a in ll.adapters(model).items()}
    files = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return list(handles.items()), copy.copy(selected), files


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: t.clone() for k, t in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("share", [25, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", VERBS)
@pytest.mark.filterwarnings("ignore::lora_lite.LoraLiteWarning")
# between `open` and the block that closes the file no code of ours can stand
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_verb_has_not_happened(name, share, tmp_path):
    verb, made = VERBS[name], adapted(tmp_path)
    ll.save(made, tmp_path / "file", name="other")
    ll.save(made, tmp_path / "other", name="default")
    ll.export(made, tmp_path / "folder", name="default")
    verb.act(verb.make(tmp_path), tmp_path)  # what is kept from a first call costs no lines in the next
    model = verb.make(tmp_path)
    Snapshot(model, X.to(model.head.weight.dtype))  # as below: it runs the model, whose first call is watched
    with At(0) as counted:
        verb.act(model, tmp_path)
    done, end = values(model), facts(model, tmp_path)
    if name in ("save", "export"):  # written anew before each interruption
        ll.save(made, tmp_path / "other", name="default")
        ll.export(made, tmp_path / "folder", name="default")
    halves = []
    for n in range(1, counted.lines + 1, max(1, counted.lines // share)):
        model = verb.make(tmp_path)
        before, start = Snapshot(model, X.to(model.head.weight.dtype)), facts(model, tmp_path)
        raised = False
        try:
            with At(n) as at:
                verb.act(model, tmp_path)
        except Interrupted:
            raised = True
        assert at.where, f"line {n} of {counted.lines} was not reached"
        # Python hears no exception out of a generator that is thrown away: nothing was interrupted then
        if (verb.ends or not raised) and same(values(model), done) and facts(model, tmp_path) == end:
            pass
        elif d := before.difference(model) or "facts" * (facts(model, tmp_path) != start):
            halves.append(f"{at.where}: {d}")
        if raised:
            verb.act(model, tmp_path)
        if name in ("save", "export"):
            ll.save(made, tmp_path / "other", name="default")
            ll.export(made, tmp_path / "folder", name="default")
    assert not halves, f"{len(halves)} of {counted.lines}: {halves[:5]}"


def test_a_rename_over_a_replaced_layer():
    for replace in (lambda m: setattr(m.layers[0], "up", nn.Linear(12, 20)), lambda m: m.layers[0]._modules.pop("up")):
        model = adapted(Path())
        replace(model)
        with pytest.raises(ll.StateError, match=r"layers\.0\.up.*gone"):
            ll.rename(model, "default", "new")
        ll.detach(model)
        assert ll.adapters(model) == {}


def test_compact_keeps_its_place_and_loses_nothing():
    model = nested(Path()).eval()
    tensors = {k: t.clone() for k, t in ll.adapter_state_dict(model, "default").items()}
    with torch.no_grad():
        old = model(X)
    variant = ll.get_variant("dylora")
    compact, calls = variant.compact, []

    def failing(view, rank):
        calls.append(view.path)
        if len(calls) == 3:
            raise RuntimeError("boom")
        return compact(view, rank)

    variant.compact = staticmethod(failing)
    try:
        with pytest.raises(RuntimeError, match="boom"):
            ll.compact(model, "default", rank=2)
    finally:
        variant.compact = staticmethod(compact)
    assert list(ll.adapters(model)) == ["default", "other"]
    assert all(torch.equal(t, tensors[k]) for k, t in ll.adapter_state_dict(model, "default").items())
    with torch.no_grad():
        assert torch.equal(model(X), old)
    ll.compact(model, "default", rank=2)
    assert list(ll.adapters(model)) == ["default", "other"]
    assert [n for n, _ in model._lora_lite_state.active] == ["default", "other"]
