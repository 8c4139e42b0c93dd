"""Several adapters, weights, one adapter per row."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.handle import adapters
from ...runtime.select import activate, active, rows
from ..case import Case, run
from .suite import Planted, check, full_precision, relative, trains


@check("selection")
def selection_restores_itself(case: Case) -> None:
    """`with ll.active` gives the selection back, after exceptions too; unknown names raise."""
    model, x = case.random("a", "b"), case.x()
    y = {}
    for choice in ("a", "b", None):
        activate(model, choice)
        y[choice] = run(model, x)
    activate(model, "a")
    try:
        with active(model, "b"):
            case.expect(torch.equal(run(model, x), y["b"]), "inside `with ll.active` another adapter acts.")
            raise Planted
    except Planted:
        pass
    case.expect(torch.equal(run(model, x), y["a"]), "after an exception in `with ll.active` the selection is not back.")
    activate(model, {"a": 0.0})
    case.expect(relative(run(model, x), y[None]) <= 8 * case.eps, "weight 0 is not the base.")
    with case.raises("activating an unknown adapter", "'nobody'"):
        activate(model, "nobody")


@check("selection", lambda case: trains(case))
def rows_equal_single_runs(case: Case) -> None:
    """One adapter per row: as in a run of its own; rows without adapter have the base's bits; NaN stays in its row;
    beams repeat rows."""
    model, x = case.random("a", "b"), case.x(5, 4)
    names = ["b", None, "a", "b", None]
    alone = {}
    for choice in ("a", "b", None):
        with active(model, choice):
            alone[choice] = run(model, x)
    tolerance = 2e-6 if case.dtype == torch.float32 else 16 * case.eps

    def compare(y: Tensor, names: list[str | None], what: str) -> None:
        for i, name in enumerate(names):
            if name is None:
                case.expect(
                    torch.equal(y[i], alone[None][i]), f"{what}: a row without adapter has not the base's bits."
                )
            else:
                case.expect(
                    (e := relative(y[i], alone[name][i])) <= tolerance,
                    f"{what}: row {i} differs from a run of its adapter alone by {e:.1e}.",
                )

    with rows(model, names):
        compare(run(model, x), names, "rows")
    with rows(model, ["a", None, None, None, None]):
        compare(run(model, x), ["a", None, None, None, None], "a single row")
    case.expect(relative(alone["a"], alone["b"]) > 1e-2, "the two random adapters do the same.")
    bad = x.clone()
    bad[2] = float("nan")
    with rows(model, names):
        y = run(model, bad)
    case.expect(y[2].isnan().any() and y[[0, 1, 3, 4]].isfinite().all(), "a NaN in one row reaches another row.")
    with rows(model, ["a", None]):
        y = run(model, x[:4])
    compare(y, ["a", "a", None, None], "beams")
    with case.raises("rows with an unknown adapter", "'nobody'"), rows(model, ["nobody"]):
        pass
    with case.raises("rows that do not fit the batch"), rows(model, ["a", "b"]):
        run(model, x)


@check("selection", lambda case: trains(case) and full_precision(case))
def rows_train_their_own_adapter(case: Case) -> None:
    """In a mixed batch each adapter gets the gradient of its rows and of no other."""
    model, x = case.random("a", "b"), case.x(4, 3)
    for handle in adapters(model).values():
        handle.trainable = True
    grads = {}
    for name, part in (("a", [0, 2]), ("b", [3])):
        with active(model, name):
            model(x[part]).square().sum().backward()
        grads[name] = [p.grad.clone() if p.grad is not None else None for p in adapters(model)[name].parameters()]
        model.zero_grad()
    with rows(model, ["a", None, "a", "b"]):
        model(x).square().sum().backward()
    for name, want in grads.items():
        for p, g in zip(adapters(model)[name].parameters(), want, strict=True):
            got, alone = (torch.zeros_like(p) if t is None else t for t in (p.grad, g))
            case.expect(
                relative(got, alone) < 1e-4,
                f"in a mixed batch adapter {name!r} gets another gradient than from its rows alone.",
            )
