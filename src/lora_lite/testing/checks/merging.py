"""5. A layer is what it does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...runtime.handle import adapters
from ...runtime.merge import merge, unmerge
from ...runtime.select import activate, active
from ..case import Case, randomise, run
from ..toy import Conv1D, FakeQuantLinear, Snapshot
from .suite import affine, check, full_precision, relative


def _merged_and_not(case: Case, model: nn.Module, paths: list[str], **options: Any) -> None:
    """Every layer alone: forward of the merged layer against forward with the adapter, in units of the dtype's
    rounding."""
    found = []
    for path in paths:
        layer = model.get_submodule(path)
        width = layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.in_features
        g = torch.Generator().manual_seed(3)
        x = torch.randn(64, int(width), generator=g).to(case.dtype)  # pyright: ignore[reportArgumentType]
        y = run(layer, x)
        with active(model, None):
            effect = relative(y, run(layer, x))
        case.expect(effect > 1e-3, f"{path}: the test adapter changes the output by only {effect:.1e}.")
        found.append((path, x, y))
    before = [t.clone() for t in (*model.parameters(), *model.buffers())]
    report = merge(model, **options)
    case.expect(report.n_layers == len(paths), f"merge touched {report.n_layers} layers, the adapter has {len(paths)}.")
    tolerance = 1e-5 if case.dtype == torch.float32 else 16 * case.eps
    for path, x, adapted in found:
        layer = model.get_submodule(path)
        error = relative(run(layer, x), adapted)
        case.expect(
            error <= tolerance,
            f"{path}: merged and adapted outputs differ by {error:.1e} of the largest output (allowed "
            f"{tolerance:.1e}).",
        )
    case.expect(merge(model).n_layers == 0, "merging again is not a no-op.")
    unmerge(model)
    after = [*model.parameters(), *model.buffers()]
    case.expect(
        len(after) == len(before) and all(torch.equal(a, b) for a, b in zip(after, before, strict=True)),
        "unmerge does not give the bits back.",
    )
    for path, x, adapted in found:
        case.expect(
            torch.equal(run(model.get_submodule(path), x), adapted),
            f"{path}: after unmerge the adapter's output has other bits.",
        )


@check("5_merge", lambda case: case.linear and full_precision(case))
def affine_is_what_it_says(case: Case) -> None:
    """f(a u + (1 - a) v) = a f(u) + (1 - a) f(v) on one layer, exactly when the method says so."""
    model = case.random(dtype="float64")
    model = model.double()
    layer = model.get_submodule(adapters(model)["default"].targets[0])
    g = torch.Generator().manual_seed(8)
    u, v = (3 * torch.randn(16, layer.in_features, generator=g, dtype=torch.float64) for _ in range(2))  # type: ignore[arg-type]
    both, apart = run(layer, 0.3 * u + 0.7 * v), 0.3 * run(layer, u) + 0.7 * run(layer, v)
    if case.variant.affine:
        case.expect(
            relative(both, apart) < 1e-9,
            f"affine is declared, yet f misses the affine law by {relative(both, apart):.1e}.",
        )
    else:
        case.expect(
            relative(both, apart) > 1e-6, "affine = False is declared, yet f is affine: merging would be possible."
        )


@check("5_merge", affine)
def merge_equals_forward(case: Case) -> None:
    for kind in (nn.Linear, Conv1D):
        model = case.model(kind=kind)
        handle = case.attach(model)
        randomise(model)
        _merged_and_not(case, model, handle.targets)


@check("5_merge", affine)
def merge_of_quantised_layers_equals_forward(case: Case) -> None:
    model = case.model(kind=FakeQuantLinear)
    handle = case.attach(model, dequantize=True)
    randomise(model)
    before = Snapshot(model, case.x())
    with case.raises("merging quantised layers without permission", "dequantize=True"):
        merge(model)
    case.expect(not (d := before.difference(model)), f"after the refusal {d}.")
    _merged_and_not(case, model, handle.targets, dequantize=True)
    case.expect(not (d := before.difference(model)), f"after unmerge of quantised layers {d}.")


@check("5_merge", affine)
def merge_of_several_equals_forward(case: Case) -> None:
    """Two adapters with weights, in attach order."""
    model = case.random("first", "second")
    activate(model, {"first": 0.7, "second": -0.4})
    _merged_and_not(case, model, adapters(model)["first"].targets)


@check("5_merge", lambda case: affine(case) and full_precision(case))
def merge_reports_its_error(case: Case) -> None:
    model, x = case.random(), case.x()
    case.expect(merge(model, check=x).logit_error is not None, "merge(check=batch) reports no error.")
    unmerge(model)
    report = merge(model, check={"x": x})
    y = effect_free = None
    unmerge(model)
    y = run(model, x)
    with active(model, None):
        effect_free = run(model, x)
    case.expect(
        report.logit_error is not None and report.logit_error <= 1e-4,
        f"merge reports an error of {report.logit_error} on the batch.",
    )
    case.expect(
        abs((report.effect or 0) - float((y - effect_free).abs().max())) < 1e-4,
        "merge reports another effect than the adapter has.",
    )


@check("5_merge", lambda case: not case.affine and full_precision(case))
def merge_of_what_is_not_affine_raises(case: Case) -> None:
    model = case.random()
    before = Snapshot(model, case.x())
    with case.raises("merging a method that is not affine", case.variant.name):
        merge(model)
    case.expect(not (d := before.difference(model)), f"after the refusal {d}.")
