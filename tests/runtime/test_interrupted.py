"""A verb that is interrupted, at whatever line, has happened whole or not at all, and can be called again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import Snapshot, toy

PACKAGE = str(Path(ll.__file__).parent)


class Interrupted(BaseException):
    """What a signal raises: no `except Exception` sees it."""


class At:
    """Inside, the n-th line of the package's own code raises; n None only counts."""

    def __init__(self, n: int | None) -> None:
        self.n, self.lines, self.where = n, 0, ""

    def __enter__(self) -> At:
        self.before = sys.gettrace()
        sys.settrace(self.call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def call(self, frame, event, arg):
        name = frame.f_code.co_filename
        # taking back is not interrupted a second time, and a generator that is closed cannot raise
        if not name.startswith(PACKAGE) or name.endswith("undo.py") or "testing" in name:
            return None
        return self.line

    def line(self, frame, event, arg):
        if event == "line":
            self.lines += 1
            if self.lines == self.n:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
                sys.settrace(None)
                raise Interrupted
        return self.line


def bare() -> nn.Module:
    torch.manual_seed(0)
    return toy().train()


def adapted(method: str = "lora") -> nn.Module:
    model = bare()
    for i, name in enumerate(("default", "other")):
        ll.attach(model, ll.get_variant(method).config(variant=method, r=4), name=name)
        randomise(model, seed=i)
    ll.activate(model, ["default", "other"])
    return model


def nested() -> nn.Module:
    return adapted("dylora")


VERBS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object]]] = {
    "attach": (bare, lambda m: ll.attach(m, ll.LoRAConfig(r=3, alpha=7))),
    "attach a second": (adapted, lambda m: ll.attach(m, ll.DoRAConfig(r=3, alpha=7), name="third")),
    "detach one": (adapted, lambda m: ll.detach(m, "default")),
    "detach all": (adapted, lambda m: ll.detach(m)),
    "rename": (adapted, lambda m: ll.rename(m, "default", "new")),
    "compact": (nested, lambda m: ll.compact(m, "default", rank=2)),
    "combine": (adapted, lambda m: ll.combine(m, {"default": 0.5, "other": -2.0}, name="sum")),
    "merge": (adapted, lambda m: ll.merge(m)),
    "load": (bare, lambda m: ll.load(m, FILE[0])),
}
FILE: list[Path] = []


def facts(model: nn.Module) -> tuple[object, ...]:
    """What a verb changes: adapters in their order, who acts, every tensor's name, what trains, hooks."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return (
        [(n, a.active, a.trainable) for n, a in ll.adapters(model).items()],
        list(model.state_dict()),
        [n for n, p in model.named_parameters() if p.requires_grad],
        hooks,
    )


@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupted_verb_happens_whole_or_not_at_all(verb, tmp_path):
    FILE[:] = [ll.save(adapted(), tmp_path / "file", name="other")]
    make, act = VERBS[verb]
    with At(None) as counted:
        done = make()
        counted.lines = 0
        act(done)
    after = facts(done)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    step = max(1, counted.lines // 60)
    for n in range(1, counted.lines + 1, step):
        model = make()
        before, start = Snapshot(model, x), facts(model)
        with At(n) as at:
            try:
                act(model)
            except Interrupted:
                pass
        if facts(model) == after and after != start:
            continue
        assert not (d := before.difference(model)), f"{verb}, interrupted at line {n} ({at.where}): {d}"
        assert facts(model) == start, f"{verb}, interrupted at line {n} ({at.where})"
        act(model)
        assert facts(model) == after, f"{verb} again, after an interruption at line {n} ({at.where})"
