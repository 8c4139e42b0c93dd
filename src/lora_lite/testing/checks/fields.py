"""The common fields of a config: a page uses r, alpha and dropout, or says that it ignores them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.errors import LoraLiteError
from ...io.native import adapter_state_dict, load_adapter_state_dict
from ...runtime.handle import adapters
from ...runtime.plan import plan
from ...runtime.select import active
from ..case import SIZES, Case, run
from ..toy import Toy
from .suite import check, full_precision

FIELDS = {
    "r": "every r gives the same tensors; use cfg.r in param_specs",
    "alpha": "with another alpha the same tensors do the same; multiply the update by layer.cfg.scale",
    "dropout": "in training the whole input arrives in spite of dropout=0.5; take layer.dropout(x)",
}
"""Field -> how its absence shows, and what to write."""
ROWS = 250
"""Rows of four tokens each; a share of them is known to 2 %."""


@check("fields", full_precision)
def ignored_fields_are_declared(case: Case) -> None:
    """`ignores` names exactly those of r, alpha and dropout that change nothing."""
    strange = [name for name in case.variant.ignores if name not in FIELDS]
    case.expect(not strange, f"ignores names {strange}; what can be ignored is {list(FIELDS)}.")
    used = {"r": _uses_r(case), "alpha": _growth(case)[0] > 0, "dropout": _uses_dropout(case)}
    for name, uses in used.items():
        declared = name in case.variant.ignores
        case.expect(
            uses or declared, f"ignores {name}: {FIELDS[name]}, or declare ignores = {(*case.variant.ignores, name)}."
        )
        case.expect(not (uses and declared), f"declares that it ignores {name}, yet {name} changes something.")


@check("fields", lambda case: full_precision(case) and "alpha" not in case.variant.ignores)
def update_grows_with_the_scale(case: Case) -> None:
    """From s to 2s to 3s a small update grows by equal steps: the scale enters once, not squared and not as a root."""
    step, bend = _growth(case)
    case.expect(
        bend < 0.05 * step,
        f"the update does not grow in proportion to layer.cfg.scale (equal steps differ by {bend / step:.0%}); "
        "multiply it by the scale once.",
    )


@check("fields", lambda case: full_precision(case) and case.toy is Toy and _drops(case))
def dropout_arrives_once(case: Case) -> None:
    """Of rows with one input that is not 0, a half at most loses it at dropout=0.5: a page that drops what was dropped
    already trains with another probability than its config says."""
    exact = Case(case.variant, torch.float64, case.bias, case.options, case.data)
    model = exact.random(dropout=0.5, dtype="float64", layers=(0,))
    layer = model.get_submodule(adapters(model)["default"].targets[0])
    one = torch.eye(exact.x().shape[-1], dtype=torch.float64)[:, None]
    felt = _update(model, layer, one).flatten(1).norm(dim=1)
    if not felt.any():
        return
    x = one[felt.argmax()].expand(ROWS, 4, -1)
    updates = _update(model, layer.train(), x).flatten(0, 1)
    _, times = torch.unique((updates / updates.abs().max()).round(decimals=9), dim=0, return_counts=True)
    alike = float(times.max()) / len(updates)
    case.expect(
        alike < 0.6,
        f"at dropout=0.5 {alike:.0%} of the rows lose their one input: layer.dropout is applied to what it has dropped "
        "already; call it once on the way from x.",
    )


def _drops(case: Case) -> bool:
    return "dropout" not in case.variant.ignores and not case.variant.noisy


def _update(model: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """What the adapter changes in the output of one layer."""
    y = run(layer, x)
    with active(model, None):
        return y - run(layer, x)


def _uses_r(case: Case) -> bool:
    """Whether two sizes that the method takes give tensors of different shapes."""
    found = set()
    for r, _ in SIZES:
        try:
            targets = plan(case.model(), case.sized(r=r)).targets
        except LoraLiteError:
            continue
        found.add(str([[spec.shape for spec in t.specs.values()] for t in targets]))
    return len(found) > 1


def _growth(case: Case) -> tuple[float, float]:
    """(size of the step, how much two steps differ) of one layer's update when alpha doubles and trebles, its small
    trained tensors the same."""
    exact = Case(case.variant, torch.float64, case.bias, case.options, case.data)
    alpha = exact.cfg().effective_alpha
    tensors: dict[str, Tensor] = {}
    updates = []
    for factor in (1, 2, 3):
        model = exact.random(alpha=factor * alpha, dtype="float64", layers=(0,), scale=1e-3)
        tensors = tensors or adapter_state_dict(model)
        load_adapter_state_dict(model, None, tensors)
        layer = model.get_submodule(adapters(model)["default"].targets[0]) if exact.toy is Toy else model
        x = exact.x(3, 5)
        updates.append(_update(model, layer, x))
    first, second = updates[1] - updates[0], updates[2] - updates[1]
    return float(first.norm()), float((second - first).norm())


def _uses_dropout(case: Case) -> bool:
    """Whether two training forwards differ; of a noisy method they always do, and its word is taken."""
    if case.variant.noisy:
        return "dropout" not in case.variant.ignores
    model, x = case.random(dropout=0.5, layers=(0,)).train(), case.x()
    return not torch.equal(run(model, x), run(model, x))
