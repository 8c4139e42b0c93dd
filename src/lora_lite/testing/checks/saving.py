"""Files, copies, names."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from ...io.load import load
from ...io.native import load_adapter_state_dict, save
from ...runtime.commit import detach, rename
from ...runtime.handle import adapters
from ...runtime.model.state import record_of
from ...runtime.select import activate
from ..case import Case, randomise, run
from ..toy import Snapshot
from .suite import check, full_precision, read_file, relative, same_tensors, tensors_of


@check("saving")
def round_trip(case: Case) -> None:
    """save, then load into a fresh model: identical output, the same tensors, nothing but the adapter in the file."""
    model, x = case.random(), case.x()
    y = run(model, x)
    with tempfile.TemporaryDirectory() as folder:
        path = save(model, Path(folder) / "x")
        case.expect(path.suffix == ".safetensors", f"the file is called {path.name}.")
        head, tensors = read_file(path)
        own = tensors_of(model)
        case.expect(list(sorted(tensors)) == sorted(own), "the file's keys are not those of adapter_state_dict.")
        case.expect(
            all(k.rsplit(".", 1)[-1].startswith("lora_") and "@" not in k for k in tensors),
            "a key does not end in lora_*.",
        )
        size = sum(t.numel() * t.element_size() for t in own.values())
        case.expect(
            path.stat().st_size <= size + 65536,
            f"the file has {path.stat().st_size} bytes for {size} bytes of tensors.",
        )
        for name in ("default", "other"):
            fresh = case.model()
            with _no_init(case):
                load(fresh, path, name=name)
            case.expect(
                torch.equal(run(fresh, x), y),
                f"the loaded adapter (called {name!r}) gives another output, by {relative(run(fresh, x), y):.1e}.",
            )
            case.expect(same_tensors(tensors_of(fresh, name), own), "the loaded tensors differ.")
            case.expect(
                not any(p.requires_grad for p in fresh.parameters()), "load(trainable=False) left something trainable."
            )
            case.expect(record_of(fresh).cfg == record_of(model).cfg, "the loaded config differs.")
            again = save(fresh, Path(folder) / "again.safetensors", name=name)
            case.expect(
                read_file(again)[0]["targets"] == head["targets"], "saving what was loaded writes other targets."
            )
        if case.variant.trains:
            handle = load(case.model(), path, trainable=True)
            case.expect(
                all(p.requires_grad for p in handle.parameters()), "load(trainable=True) left a trained tensor frozen."
            )
            order = [tuple(p.shape) for p in adapters(model)["default"].parameters()]
            case.expect(
                [tuple(p.shape) for p in handle.parameters()] == order,
                "the loaded parameters come in another order, which an optimiser's saved state would not fit.",
            )
    fresh = case.fresh(seed=1)  # frozen tensors start elsewhere too
    load_adapter_state_dict(fresh, None, own)
    case.expect(torch.equal(run(fresh, x), y), "load_adapter_state_dict gives another output.")
    case.expect(same_tensors(tensors_of(fresh), own), "load_adapter_state_dict does not load every tensor.")
    with case.raises("a state dict with a missing key"):
        load_adapter_state_dict(fresh, None, dict(list(own.items())[1:]))


@check("saving", full_precision)
def wrong_base_raises(case: Case) -> None:
    if not case.linear:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = save(case.random(), Path(folder) / "x.safetensors")
        other = case.model()
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        before = Snapshot(other, case.x())
        with case.raises("loading onto another base", "base"):
            load(other, path)
        case.expect(not (d := before.difference(other)), f"after a load that was refused {d}.")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            load(other, path, base_check="warn")
        case.expect(seen, "base_check='warn' does not warn.")


@check("saving", full_precision)
def copies_are_independent(case: Case) -> None:
    """deepcopy and pickle carry the adapter, and training the copy leaves the original alone."""
    model, x = case.random(), case.x()
    y = run(model, x)
    for how in ("deepcopy", "pickle"):
        twin = copy.deepcopy(model) if how == "deepcopy" else pickle.load(io.BytesIO(pickle.dumps(model)))
        case.expect(torch.equal(run(twin, x), y), f"a {how} gives another output.")
        randomise(twin, seed=77)
        activate(twin, None)
        case.expect(torch.equal(run(model, x), y), f"changing a {how} changes the original.")
        detach(twin)
        case.expect(torch.equal(run(model, x), y), f"detaching from a {how} changes the original.")


@check("saving", full_precision)
def rename_keeps_the_objects(case: Case) -> None:
    model, x = case.random(), case.x()
    y, own = run(model, x), {id(p) for p in model.parameters()}
    rename(model, "default", "new-name")
    case.expect(torch.equal(run(model, x), y), "renaming changes the output.")
    case.expect({id(p) for p in model.parameters()} == own, "renaming replaces parameters.")
    case.expect(list(adapters(model)) == ["new-name"], "the new name is not listed.")


def _no_init(case: Case) -> Any:
    """Inside, `init` and `group_init` fail: loading needs neither."""
    from contextlib import ExitStack

    def never(*_: Any) -> None:
        raise AssertionError(f"{case}: load ran init or group_init.")

    stack = ExitStack()
    for member in ("init", "group_init"):
        if getattr(case.variant, member) is not None:
            stack.enter_context(case.patched(member, never))
    return stack
