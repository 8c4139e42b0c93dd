"""0. The page itself: what `param_specs`, `forward` and `forward_input` hand back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from ...core.errors import ConfigError
from ...core.spec import ParamSpec
from ..case import SIZES, Case, run
from ..toy import HIDDEN, WIDTH
from .suite import check

PAGES = ("forward", "forward_input")


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
    """`forward` returns y_new and `forward_input` x_new: one tensor of the shape and dtype of y, or of x."""
    for shape in ((5,), (3, 5)):
        with ExitStack() as patches:
            for member in PAGES:
                if (page := getattr(case.variant, member)) is not None:
                    patches.enter_context(case.patched(member, _watched(case, member, page)))
            run(case.fresh(), case.x(*shape))


def _watched(case: Case, member: str, page: Callable[..., Any]) -> Callable[..., Any]:
    """The page, with a look at what it returns."""
    letter = "y" if member == "forward" else "x"

    def watched(layer: Any, *values: Tensor) -> Any:
        old, new = values[-1], page(layer, *values)
        where = f"{member} on {layer.path}"
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
            new.dtype == old.dtype,
            f"{where} returns {new.dtype} for {letter} in {old.dtype}; layer.lora_* are in {letter}'s dtype already, "
            f"what comes from layer.master or layer.tiny needs .to({letter}.dtype).",
        )
        return new

    return watched


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
