"""Every public call, with each of its arguments wrong, missing, swapped or unknown: an error of ours names it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.core.arguments import CallError, checked


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6))


def adapted() -> nn.Sequential:
    m = model()
    for seed, name in enumerate("ab"):
        ll.attach(m, ll.LoRAConfig(r=3, alpha=5, seed=seed), name=name)
    return m


def sgd(m: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)


class Trainer:
    def compute_loss(self) -> None: ...


class Page:
    name = "page_of_test_arguments"

    @staticmethod
    def param_specs(d_in, d_out, cfg):
        return {"lora_g": ll.ParamSpec((d_out,))}

    @staticmethod
    def forward(layer, x, y):
        return y + layer.lora_g


def saved() -> str:
    ll.save(adapted(), "x.safetensors", name="a")
    return "x.safetensors"


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "attach": lambda: {"model": model(), "cfg": ll.LoRAConfig(r=3)},
    "plan": lambda: {"model": model(), "cfg": ll.LoRAConfig(r=3)},
    "load": lambda: {"model": model(), "path": saved()},
    "save": lambda: {"model": adapted(), "path": "y.safetensors", "name": "a"},
    "export": lambda: {"model": adapted(), "folder": "z", "name": "a"},
    "trainer": lambda: {"base": Trainer},
    "adapter_state_dict": lambda: {"model": adapted(), "name": "a"},
    "load_adapter_state_dict": lambda: {"model": (m := adapted()), "name": "a", "state": ll.adapter_state_dict(m, "a")},
    "check": lambda: {"model": adapted()},
    "combine": lambda: {"model": adapted(), "weights": {"a": 0.5, "b": 0.5}, "name": "ab"},
    "factors": lambda: {"model": adapted(), "name": "a"},
    "detach": lambda: {"model": adapted(), "name": "a"},
    "rename": lambda: {"model": adapted(), "old": "a", "new": "c"},
    "compact": lambda: {"model": adapted(), "name": "a"},
    "adapters": lambda: {"model": adapted()},
    "merge": lambda: {"model": adapted()},
    "unmerge": lambda: {"model": adapted()},
    "merge_and_unload": lambda: {"model": adapted()},
    "precondition": lambda: {"model": (m := adapted()), "optimizer": sgd(m)},
    "penalty": lambda: {"model": adapted()},
    "schedule": lambda: {"model": (m := adapted()), "optimizer": sgd(m), "total_steps": 3},
    "activate": lambda: {"model": adapted(), "choice": "a"},
    "active": lambda: {"model": adapted(), "choice": "a"},
    "context": lambda: {"model": adapted()},
    "prompt": lambda: {"model": adapted(), "lengths": [1, 2]},
    "rows": lambda: {"model": adapted(), "names": ["a", None]},
    "cost": lambda: {"model": model(), "cfg": ll.LoRAConfig(r=3)},
    "AdapterStore": lambda: {"model": adapted(), "folder": "."},
    "register": lambda: {"cls": Page},
    "get_variant": lambda: {"name": "lora"},
    "ParamSpec": lambda: {"shape": (3,)},
}
WRONG = {
    "None": None, "a number": 3, "a word": "x y", "a dict": {"x": 1}, "a module": nn.Linear(2, 2), "a list": [1.5],
    "not a number": float("nan"),
}  # fmt: skip
PLAIN = {"get_variant", "register", "ParamSpec", "variants"}
"""Without the wrapper: Python itself says which argument is missing or unknown."""


FITS = {
    "None": ("None", "Any", "Choice"), "a number": ("int", "float"), "a word": ("str",),
    "a module": ("nn.Module", "Callable"),
}  # fmt: skip
"""What may pass: where the annotation has such a word."""


def called(name: str, values: dict[str, Any]) -> None:
    found = getattr(ll, name)(**values)
    if isinstance(found, AbstractContextManager) and not isinstance(found, Path):
        with found:
            pass


@pytest.fixture(autouse=True)
def empty_place(tmp_path, monkeypatch):
    from lora_lite.core import registry

    monkeypatch.chdir(tmp_path)
    before = dict(registry._TABLE)
    yield
    registry._TABLE.clear()
    registry._TABLE.update(before)


def test_every_public_call_is_listed():
    found = {n for n in ll.__all__ if callable(getattr(ll, n)) and not inspect.isclass(getattr(ll, n))}
    assert found - CALLS.keys() == {"variants"}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_argument_is_named(name):
    for argument, p in inspect.signature(getattr(ll, name)).parameters.items():
        if p.kind is p.VAR_KEYWORD:
            continue
        for what, value in WRONG.items():
            try:
                called(name, {**CALLS[name](), argument: value})
                fits = set(re.findall(r"[\w.]+", str(p.annotation))) & set(FITS.get(what, ()))
                assert fits, f"ll.{name}({argument}={what}) passed, and is no {p.annotation}"
            except ll.LoraLiteError:
                continue
            except AssertionError:
                raise
            except Exception as e:
                raise AssertionError(f"ll.{name}({argument}={what}): {type(e).__name__}: {e}") from None


@pytest.mark.parametrize("name", sorted(CALLS.keys() - PLAIN))
def test_a_missing_an_unknown_and_swapped_arguments(name):
    values, call = CALLS[name](), getattr(ll, name)
    parameters = inspect.signature(call).parameters
    for argument in (a for a in values if parameters[a].default is inspect.Parameter.empty):
        with pytest.raises(CallError, match=rf"^ll\.{name} needs {argument}: ll\.{name}\(.*{argument}"):
            called(name, {a: v for a, v in values.items() if a != argument})
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        with pytest.raises(TypeError, match="has no argument 'modle'. Did you mean 'model'"):
            called(name, {**values, "modle": 1})
    with pytest.raises(ll.ConfigError, match="in this order, and got 20 arguments"):
        call(*range(20))
    first = next(iter(values))
    with pytest.raises(ll.ConfigError, match=f"got {first} twice"):
        call(values[first], **{first: values[first]})
    if len(values) > 1:
        a, b, *rest = values.values()
        with pytest.raises(ll.LoraLiteError):
            called(name, dict(zip(values, (b, a, *rest), strict=True)))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ll.combine(adapted(), {"a": 1.0}), r"ll.combine needs name: ll.combine\(model, weights, name\)"),
        (lambda: ll.combine(adapted(), {"a": 1.0}, "c", rank="4"), "rank is a whole number or None, got '4' of str"),
        (lambda: ll.combine(adapted(), {"a": 1.0}, "c", seed=True), "seed is a whole number, got True of bool"),
        (lambda: ll.combine(adapted(), {"a": 1.0}, "c", density=None), "density is a number, got None of NoneType"),
        (lambda: ll.context(task_ids=[1]), r"ll.context needs model: ll.context\(model\)"),
        (
            lambda: ll.adapters(adapted())["a"].param_groups(),
            r"adapter.param_groups needs lr: adapter.param_groups\(lr",
        ),
        (lambda: ll.adapters(adapted())["a"].param_groups(1e-3, decay=1), "Did you mean 'weight_decay'"),
        (lambda: ll.save(adapted(), "x", name=["a"]), "name is an adapter's name, a str such as 'default', or None"),
        (lambda: ll.save(adapted(), "x", name="a", compact="yes"), "compact is True or False, got 'yes' of str"),
        (lambda: ll.load(model(), saved(), trainable=1), "trainable is True or False, got 1 of int"),
        (lambda: ll.load(model(), saved(), config={"r": 8}), "config= is for tensors at hand"),
        (lambda: ll.merge(adapted(), check="a text"), "a batch is a tensor"),
        (lambda: ll.rows(adapted(), ["a"], owners=3).__enter__(), "the number of its row, 0 to 0; got 3"),
        (lambda: ll.trainer(Trainer, {"r": 8}), "config such as"),
        (lambda: ll.register(Page()), "takes a class"),
        (lambda: ll.ParamSpec((3,), dtype="int64"), "torch.dtype such as"),
        (lambda: ll.ParamSpec((3,), decay=0.1), "decay is True or False"),
    ],
)
def test_in_words(call, says):
    with pytest.raises(ll.ConfigError if "row" not in says else ll.SelectionError, match=says):
        call()


def test_the_wrapper_changes_nothing_else():
    @checked
    def f(model: nn.Module, n: int = 3, *, deep: bool = False, **more: Any) -> tuple[Any, ...]:
        """What it does."""
        return model, n, deep, more

    assert f(1, 2, deep=True, x=4) == (1, 2, True, {"x": 4}) and f.__doc__ == "What it does."
    assert list(inspect.signature(f).parameters) == ["model", "n", "deep", "more"]
    assert f(1, n=torch.iinfo(torch.int8).max)[1] == 127
