"""What an adapter knows stands in its tensors: nothing on the class, in the module of the page or on a layer."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ...core.variant import Variant
from ...io.native import load_adapter_state_dict
from ...runtime.model.site import owned_tensors
from ...runtime.model.state import record_of
from ..case import Case, randomise, run, train
from ..toy import Toy
from .suite import check, full_precision, tensors_of, trains

Trace = dict[str, list[Any]]


@check("tensors", full_precision)
def nothing_is_kept_outside_of_tensors(case: Case) -> None:
    """attach, training and calls leave no trace on the class, in its module, or in attributes of layers."""
    model = case.model()
    before, attributes = _trace(case.variant), _attributes(model)
    case.attach(model)
    if case.variant.trains:
        train(case, model.train(), steps=2)
    run(model.eval(), case.x())
    after = _trace(case.variant)
    changed = [k for k in {**before, **after} if not _same(before.get(k), after.get(k))]
    case.expect(
        not changed,
        f"{', '.join(changed)} changed while an adapter was attached and trained; what a page keeps has to be a tensor "
        "from param_specs (as_buffer=True): anything else is lost in files and shared between models.",
    )
    new = sorted(_attributes(model) - attributes)
    case.expect(
        not new,
        f"{', '.join(new)} appeared on the model; what a page keeps has to be a tensor from param_specs: anything else "
        "is lost in files.",
    )


@check("tensors", lambda case: full_precision(case) and trains(case))
def the_tensors_decide_alone(case: Case) -> None:
    """Two models with other tensors do not act on each other; the same tensors give the same bits, whatever ran
    before; every trained tensor acts."""
    x, models = case.x(), []
    for seed in (10, 20):
        models.append(case.fresh())
        randomise(models[-1], seed=seed)
    one, two = models
    y = run(one, x)
    other = run(two, x)
    case.expect(not torch.equal(y, other), "a second model with other tensors gives the first one's output.")
    run(two, case.x(2, 3, seed=6))
    case.expect(torch.equal(run(one, x), y), "a call of another model changes the output.")
    load_adapter_state_dict(one, None, tensors_of(two))
    case.expect(
        torch.equal(run(one, x), other),
        "after new values were copied into its tensors the adapter does not act as one that had them from the start.",
    )
    for target, short, _, t in owned_tensors(one, record_of(one)):
        if target.specs[short].is_trained:
            before = _drawn_alike(case, one, x)
            with torch.no_grad():
                t.mul_(1.5).add_(0.1)
            after = _drawn_alike(case, one, x)
            case.expect(not torch.equal(after, before), f"a new value of {target.path}.{short} changes nothing.")


def _drawn_alike(case: Case, model: Toy, x: Tensor) -> Tensor:
    """The output; of a method that draws noise in training, the one there, with the same noise at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return run(model.train(case.variant.noisy), x)


def _trace(variant: type[Variant]) -> Trace:
    """Name -> value of every attribute of the class and every global of its module, containers with their content."""
    found: Trace = {}
    for cls in variant.__mro__:
        if cls is not object and cls is not Variant:
            found |= {f"{cls.__name__}.{k}": _content(v) for k, v in vars(cls).items() if not k.startswith("__")}
    module = sys.modules.get(variant.__module__)
    if module is not None:
        name = variant.__module__.rsplit(".", 1)[-1]
        found |= {f"{name}.{k}": _content(v) for k, v in list(vars(module).items()) if not k.startswith("__")}
    return found


def _content(value: Any) -> list[Any]:
    """The value, what a container holds, and how often a tensor was written."""
    if isinstance(value, dict):
        return [value, *value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [value, *value]
    if isinstance(value, Tensor):
        return [value, value._version]
    return [value]


def _same(old: list[Any] | None, new: list[Any] | None) -> bool:
    """Whether two contents are the same objects. Objects are kept, so that no address is used twice."""
    if old is None or new is None or len(old) != len(new):
        return False
    return all(a is b or (isinstance(a, int) and a == b) for a, b in zip(old, new, strict=True))


def _attributes(model: Toy) -> set[str]:
    """ "path.attribute" of everything on the modules but what the library itself puts there."""
    return {
        f"{path}.{name}" for path, m in model.named_modules() for name in vars(m) if not name.startswith("_lora_lite")
    }
