"""An interruption at any line of a verb leaves the model as it was."""

from __future__ import annotations

import sys

import pytest
import torch

import lora_lite as ll
from lora_lite.runtime import commit
from lora_lite.runtime.model.undo import all_or_nothing, restoring
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import toy

UP = (r"layers\.0\.up", "head")
X = torch.randn(3, 12, generator=torch.Generator().manual_seed(4))
STEPS = ("put_on", "take_off", "give_name", "put_in_order", "_finish", "_site_of", "_register", "_adopt", "_take_from")
STEPS += ("_take_off", "_release", "_drop", "_rename_key", "_sort")


class Interruption:
    """Strikes at the n-th line that the steps of the verbs run, if they run so many."""

    def __init__(self, n: int) -> None:
        self.left, self.struck = n, False

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self.enter)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def enter(self, frame, event, arg):
        code = frame.f_code
        return self.line if code.co_filename == commit.__file__ and code.co_name in STEPS else None

    def line(self, frame, event, arg):
        if event == "line" and not self.struck:
            self.left -= 1
            if self.left == 0:
                self.struck = True
                raise KeyboardInterrupt
        return self.line


def bare():
    model = toy()
    model.head.weight.requires_grad_(False)
    return model


def adapted():
    model = bare()
    ll.attach(model, ll.DyLoRAConfig(r=3, alpha=7, target_names=UP))
    ll.attach(model, ll.LoRAConfig(r=2, alpha=5, target_names=UP[:1]), name="b")
    randomise(model)
    randomise(model, "b", seed=3)
    return model


def alone():
    model = bare()
    ll.attach(model, ll.LoRAConfig(r=2, alpha=5, target_names=UP))
    randomise(model)
    return model


VERBS = {
    "the first attach": (bare, lambda m: ll.attach(m, ll.HRAConfig(r=2, target_names=UP))),
    "another attach": (adapted, lambda m: ll.attach(m, ll.IA3Config(target_names=UP[:1]), name="c")),
    "detach of one": (adapted, lambda m: ll.detach(m, "b")),
    "detach of the last": (alone, ll.detach),
    "rename": (adapted, lambda m: ll.rename(m, "default", "c")),
    "compact": (adapted, lambda m: ll.compact(m, "default", rank=2)),
}


def facts(model) -> list[object]:
    """What an outsider sees of the adapters, and the hooks of every module."""
    handles = ll.adapters(model)
    selected = {n: (h.active, h.trainable, h.num_parameters(), list(h.targets)) for n, h in handles.items()}
    hooks = [(list(m._forward_pre_hooks.values()), list(m._forward_hooks.values())) for m in model.modules()]
    flags = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    return [list(handles), selected, hooks, flags, list(model.state_dict())]


@pytest.mark.parametrize("verb", VERBS)
def test_interrupted_at_any_line(verb):
    make, call = VERBS[verb]
    model, n = make().eval(), 0
    with torch.no_grad():
        before, seen = model(X), facts(model)
    while True:
        n += 1
        interruption = Interruption(n)
        try:
            with interruption:
                call(model)
        except KeyboardInterrupt:
            pass
        if not interruption.struck:
            break
        assert facts(model) == seen, f"at line {n}"
        with torch.no_grad():
            assert torch.equal(model(X), before), f"at line {n}"
    assert n > 30
    assert facts(model) != seen


def test_steps_are_taken_back_last_to_first():
    order = []

    def steps(undo):
        undo(lambda: order.append(1))
        undo(lambda: order.append(2))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        all_or_nothing(steps)
    assert order == [2, 1]


def test_a_second_exception_finds_the_step_again():
    order = []

    def twice():
        order.append(len(order))
        if len(order) == 1:
            raise KeyboardInterrupt

    def steps(undo):
        undo(lambda: order.append("first"))
        undo(twice)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        all_or_nothing(steps)
    assert order == [0, 1, "first"]


def test_tables_and_attributes_come_back_in_their_order():
    class Thing:
        pass

    thing, table = Thing(), {"a": 1, "b": 2}
    thing.old = 1
    restore = restoring(thing, table)
    thing.old, thing.new = 2, 3
    table["a"] = table.pop("a") + 9
    table["c"] = 3
    restore()
    assert vars(thing) == {"old": 1}
    assert list(table.items()) == [("a", 1), ("b", 2)]
