"""4. All or nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...io.load import load
from ...io.native import save
from ...runtime.attach import attach
from ...runtime.merge import merge
from ...runtime.model.state import record_of
from ..case import Case
from ..toy import Snapshot
from .suite import Planted, affine, check, full_precision, read_file, write_file


@dataclass
class Failure:
    """One way in which an attach fails: a member of the variant that is replaced, or other data."""

    what: str
    member: str = ""
    function: Callable[..., Any] | None = None
    data: Callable[[], Any] | None = None

    def strike(self, case: Case, model: nn.Module) -> None:
        """Attach, and fail."""
        if self.data is not None:
            attach(model, case.cfg(), self.data())
            return
        with case.patched(self.member, self.function):
            case.attach(model)


@check("4_all_or_nothing", full_precision)
def failed_attach_leaves_no_trace(case: Case) -> None:
    """`init` fails at the last target, `group_init` after its work, the data in the middle."""
    for second in (False, True):  # on a bare model, and on one that has an adapter already
        for failure in _failures(case):
            model = case.model().train()
            model.layers[0].eval()
            if second:
                case.attach(model, "first")
            before = Snapshot(model, case.x())
            try:
                failure.strike(case, model)
            except Planted:
                pass
            else:
                case.expect(False, f"a failure in {failure.what} was swallowed.")
            case.expect(not (d := before.difference(model)), f"after a failure in {failure.what} {d}.")
            case.attach(model)  # and the model still takes an adapter


def _failures(case: Case) -> list[Failure]:
    n = len(record_of(case.fresh()).targets)
    init, group_init = case.variant.init, case.variant.group_init
    calls = 0

    def failing_init(layer: Any, cfg: Any) -> None:
        nonlocal calls
        calls += 1
        torch.rand(3)
        if calls == n:
            raise Planted
        if init is not None:
            init(layer, cfg)

    def failing_group_init(*args: Any) -> None:
        if group_init is not None:
            group_init(*args)
        raise Planted

    def one_good_batch() -> Any:
        yield from case.data(case.dtype)[:1]
        raise Planted

    found = [
        Failure("init at its last target", "init", failing_init),
        Failure("group_init", "group_init", failing_group_init),
    ]
    return [*found, Failure("the calibration data", data=one_good_batch)] if case.variant.needs_data else found


@check("4_all_or_nothing")
def attach_draws_no_global_random_number(case: Case) -> None:
    model = case.model().train()
    model.layers[1].eval()
    before, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    case.attach(model)
    case.expect(
        torch.equal(before, torch.get_rng_state()), "attach moved the global random state; draw from layer.generator()."
    )
    case.expect(modes == [m.training for m in model.modules()], "attach changed training modes.")


@check("4_all_or_nothing", lambda case: full_precision(case))
def failed_load_leaves_no_trace(case: Case) -> None:
    """A renamed parent, a missing key, one too many, another prefix: each raises and names the keys."""
    with tempfile.TemporaryDirectory() as folder:
        path = save(case.random(), Path(folder) / "x.safetensors")
        head, tensors = read_file(path)
        first = next(iter(tensors))
        damaged = {
            "a missing key": {k: v for k, v in tensors.items() if k != first},
            "an added key": {**tensors, "layers.0.up.lora_stranger": torch.zeros(1)},
            "another prefix": {f"base.{k}": v for k, v in tensors.items()},
            "a wrong shape": {**tensors, first: torch.zeros(*tensors[first].shape, 2)},
            "NaN": {**tensors, first: _with_nan(tensors[first])},
        }
        model = case.model()
        before = Snapshot(model, case.x())
        for what, changed in damaged.items():
            if what == "NaN" and not tensors[first].is_floating_point():
                continue
            bad = write_file(Path(folder) / "bad.safetensors", head, changed)
            with case.raises(f"loading a file with {what}"):
                load(model, bad)
            case.expect(not (d := before.difference(model)), f"after a load that failed for {what} {d}.")
        renamed = case.model()
        renamed.blocks = renamed.layers
        del renamed._modules["layers"]
        with case.raises("loading into a model with a renamed parent", "layers.0"):
            load(renamed, path)


def _with_nan(t: torch.Tensor) -> torch.Tensor:
    """A copy with one NaN, where its dtype has any."""
    t = t.clone()
    if t.is_floating_point():
        t.view(-1)[-1] = float("nan")
    return t


@check("4_all_or_nothing", affine)
def failed_merge_leaves_no_trace(case: Case) -> None:
    from ...runtime import merge as room

    model = case.random()
    before = Snapshot(model, case.x())
    original, calls = room._merge_layer, 0

    def failing(*args: Any) -> None:
        nonlocal calls
        calls += 1
        original(*args)
        if calls == 3:
            raise Planted

    room._merge_layer = failing
    try:
        merge(model)
    except Planted:
        pass
    else:
        case.expect(False, "a failure in merge was swallowed.")
    finally:
        room._merge_layer = original
    case.expect(not (d := before.difference(model)), f"after a merge that failed at its third layer {d}.")
