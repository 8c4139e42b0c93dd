"""3. Nothing is silent."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ...io.native import save
from ...runtime.attach import attach
from ...runtime.commit import detach
from ...runtime.model.state import record_of
from ..case import Case, randomise, train
from ..toy import FakeQuantLinear, Snapshot
from .suite import check, full_precision


@check("3_nothing_silent", full_precision)
def wrong_calls_raise(case: Case) -> None:
    """Data missing or superfluous, dead patterns, taken names, unknown fields."""
    model = case.model()
    before = Snapshot(model, case.x())
    if case.variant.needs_data:
        with case.raises("attaching without data", "calibration_data", case.variant.name):
            attach(model, case.cfg())
        with case.raises("attaching with an empty list of data"):
            attach(model, case.cfg(), [])
    elif case.variant.group_init is None:
        with case.raises("calibration data that the method does not use", "calibration_data"):
            attach(model, case.cfg(), case.data(case.dtype))
    for changes in (
        {"target_names": ("nothing_here",)},
        {"exclude_names": ("nothing_here",)},
        {"layers": (7,)},
        {"rank_pattern": {"nothing_here": case.cfg().r}},
    ):
        with case.raises(f"attaching with {changes}", next(iter(changes))):
            cfg = case.variant.config(**{**case.cfg().to_dict(), **changes})
            attach(model, cfg, case.data(case.dtype) if case.variant.needs_data else None)
    with case.raises("an unknown field", "no_such_field"):
        case.variant.config.from_dict({**case.cfg().to_dict(), "no_such_field": 1})
    case.expect(not (d := before.difference(model)), f"after calls that raised {d}.")
    case.attach(model)
    with case.raises("a second adapter of the same name", "'default'"):
        case.attach(model)


@check("3_nothing_silent", lambda case: case.variant.on_step is not None and full_precision(case))
def schedule_must_be_stepped(case: Case) -> None:
    """A scheduled method that nothing steps raises at the second training forward, and at save."""
    model = case.fresh().train()
    model(case.x())
    with case.raises("a second training forward without schedule", "ll.schedule"):
        model(case.x())
    with tempfile.TemporaryDirectory() as folder, case.raises("saving without schedule", "schedule"):
        save(model, Path(folder) / "x.safetensors")
    model = case.fresh().train()
    train(case, model, steps=4)
    case.expect(record_of(model).steps == 4, f"4 optimiser steps made {record_of(model).steps} schedule steps.")


@check("3_nothing_silent", lambda case: case.linear and full_precision(case))
def quantised_weight_is_read_only_on_request(case: Case) -> None:
    """A method that reads W raises on a quantised layer, and works with dequantize=True; any other needs no
    permission."""
    model = case.model(kind=FakeQuantLinear)
    before = Snapshot(model, case.x())
    if case.variant.needs_weight:
        with case.raises("attaching to quantised layers", "dequantize=True", "layers.0.up"):
            case.attach(model)
        case.expect(not (d := before.difference(model)), f"after the refusal {d}.")
        case.attach(model, dequantize=True)
    else:
        case.attach(model)
    if case.variant.trains:
        randomise(model)
        model(case.x()).square().sum().backward()
    detach(model)
    case.expect(not (d := before.difference(model)), f"after detach from quantised layers {d}.")
