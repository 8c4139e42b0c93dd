"""0. The page itself: what `param_specs`, `forward` and `forward_input` hand back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ...core.errors import ConfigError, LoraLiteError
from ...core.spec import ParamSpec
from ...core.variant import forward_of
from ...runtime.plan import plan
from ..case import SIZES, Case, run
from ..toy import HIDDEN, WIDTH
from .suite import check, full_precision, trains

PAGES = {"forward": ("x", "y"), "forward_input": ("x",), "weight": ("W",)}
"""Page -> what it is given after the layer; it returns the last of these anew."""
Specs = Mapping[str, Mapping[str, ParamSpec]]


@check("0_page")
def specs_are_a_dict_of_specs(case: Case) -> None:
    """`param_specs` gives {"lora_NAME": ParamSpec(...)}."""
    specs = _first_specs(case)
    case.expect(isinstance(specs, dict), f"param_specs returns {_kind(specs)}, not a dict of ParamSpec.")
    for name, spec in specs.items():
        case.expect(isinstance(spec, ParamSpec), f"param_specs: {name!r} is {_kind(spec)}, not a ParamSpec.")


def _first_specs(case: Case) -> Any:
    """What `param_specs` returns at the first size that the method takes."""
    refusal: ConfigError | None = None
    for r, alpha in SIZES:
        try:
            cfg = case.sized(**{"r": r, "alpha": alpha, **case.options})
            return case.variant.param_specs(WIDTH, HIDDEN if case.linear else WIDTH, cfg)
        except ConfigError as e:
            refusal = e
    raise AssertionError(f"{case.variant.name}: takes none of the sizes (r, alpha) {SIZES}: {refusal}")


@check("0_page")
def pages_return_what_they_rewrite(case: Case) -> None:
    """`forward` returns y_new, `forward_input` x_new and `weight` W_new: one tensor of the shape of y, x or W (of the
    same dtype too, but for W), at every size; and they write into nothing that they are given."""
    another = _another_size(case) if case.bias and full_precision(case) else []
    for shape, r in [((5,), None), ((3, 5), None), *(((3, 5), r) for r in another)]:
        changes = {} if r is None else {"r": r}
        specs = {t.path: t.specs for t in plan(case.model(), case.cfg(**changes)).targets}
        with ExitStack() as patches:
            for member, function in _watched_pages(case, specs, r).items():
                patches.enter_context(case.patched(member, function))
            try:
                model = case.random(**changes)
            except ConfigError:
                if r is None:
                    raise
                continue  # its data do not suffice for this size
            run(model, case.x(*shape))


def _another_size(case: Case) -> list[int]:
    """A second size that the method takes on the toy model, where it uses the size at all."""
    first = case.cfg().r
    for r in dict.fromkeys(r for r, _ in SIZES if r != first and "r" not in case.variant.ignores):
        try:
            plan(case.model(), case.sized(r=r))
        except LoraLiteError:
            continue
        return [r]
    return []


def _watched_pages(case: Case, specs: Specs, r: int | None) -> dict[str, Callable[..., Any]]:
    """The pages of the variant, with a look at what they return."""
    found = {m: _watched(case, m, page, specs, r) for m in PAGES if (page := getattr(case.variant, m)) is not None}
    if hasattr(case.variant.forward, "follows"):
        found["forward"] = forward_of(found["weight"])
    return found


def _watched(case: Case, member: str, page: Callable[..., Any], specs: Specs, r: int | None) -> Callable[..., Any]:
    """The page, with a look at what it returns."""
    letter = PAGES[member][-1]

    def watched(layer: Any, *values: Tensor) -> Any:
        old, where = values[-1], f"{member} on {layer.path}"
        before = [value.clone() for value in values]
        _check_signature(case, member, page)
        try:
            new = page(layer, *values)
        except LoraLiteError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError) as e:
            given = [f"{name} {tuple(v.shape)}" for name, v in zip(PAGES[member], values, strict=True)]
            held = [f"{name} {spec.shape}" for name, spec in specs.get(layer.path, {}).items()]
            size = "" if r is None else f" With r={r} as with any other, take the size from cfg.r."
            raise AssertionError(
                f"{case}: {where} raises {type(e).__name__}: {e}. It was given {', '.join(given)}, where param_specs "
                f"declares {', '.join(held) or 'no tensor'}; x may have any number of dimensions before the last.{size}"
            ) from e
        case.expect(
            new is not None,
            f"{where} returns None; end it with `return {letter} + ...`: what it returns replaces {letter}.",
        )
        case.expect(isinstance(new, Tensor), f"{where} returns {_kind(new)}, not one tensor like {letter}.")
        case.expect(
            new.shape == old.shape,
            f"{where} returns the shape {tuple(new.shape)} for {letter} {tuple(old.shape)}; it has to keep it.",
        )
        case.expect(
            new.dtype == old.dtype or member == "weight",
            f"{where} returns {new.dtype} for {letter} in {old.dtype}; layer.lora_* are in {letter}'s dtype already, "
            f"what comes from layer.master or layer.tiny needs .to({letter}.dtype).",
        )
        for name, value, was in zip(PAGES[member], values, before, strict=True):
            case.expect(
                torch.equal(value, was),
                f"{where} writes into {name}, which others read; `{letter} + ...` makes a tensor of its own, where "
                f"`{letter}.add_` and `{letter} += ...` do not.",
            )
        return new

    return watched


def _check_signature(case: Case, member: str, page: Callable[..., Any]) -> None:
    """Raise unless the page can be called as it will be."""
    asked = ("layer", *PAGES[member])
    try:
        inspect.signature(page).bind(*asked)
    except TypeError:
        raise AssertionError(f"{case}: write the page as {member}({', '.join(asked)}).") from None


@check("0_page", lambda case: trains(case) and full_precision(case))
def gradients_come_out_of_the_page(case: Case) -> None:
    """What the page adds depends on its tensors, so that they can learn."""
    case.expect(
        case.random()(case.x()).requires_grad,
        "no gradient reaches a tensor of the adapter: the page cuts it off (detach, .data, no_grad), or uses none.",
    )


@check("0_page")
def rows_and_tokens_are_independent(case: Case) -> None:
    """Changing row j must not change row i, changing a later token not an earlier one."""
    model, x = case.random(), case.x(3, 5)
    y = run(model, x)
    other = x.clone()
    other[1] += 3
    case.expect(torch.equal(run(model, other)[[0, 2]], y[[0, 2]]), "changing one row changes another row.")
    other = x.clone()
    other[:, 3:] -= 2
    case.expect(torch.equal(run(model, other)[:, :3], y[:, :3]), "changing later tokens changes earlier ones.")


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
