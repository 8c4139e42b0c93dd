"""`Variant`: what an adapter method may say about itself. Everything but `name`, `param_specs` and a forward has a
default."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .config import AdapterConfig
from .errors import LoraLiteError
from .spec import ParamSpec

WIDE = 4096
"""Inputs and outputs of the layer on which a page is asked for its specs, to see whether it trains."""


Shared = dict[str, ParamSpec] | list[tuple[list[Any], dict[str, ParamSpec]]]
"""What `shared_specs` returns: tensors of all targets, or of groups of them."""


class Derived:
    """A fact that follows from other members: read like any other, never declared."""

    def __init__(self, rule: Callable[[type[Variant]], bool], since: str) -> None:
        self.rule, self.since = rule, since

    def __get__(self, _: object, owner: type[Variant]) -> bool:
        return self.rule(owner)


def _trains(page: type[Variant]) -> bool:
    try:
        specs = page.param_specs(WIDE, WIDE, page.config(variant=page.name))
    except LoraLiteError:  # the page refuses this size, which a method without trained tensors has no reason to
        return True
    return page.shared_specs is not None or any(spec.is_trained for spec in specs.values())


def forward_of(weight: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Any, Tensor], Tensor]:
    """The `forward` that follows from a `weight`."""

    def forward(layer: Any, x: Any, y: Tensor) -> Tensor:
        def change() -> Tensor:
            W = layer.weight.to(torch.promote_types(torch.float32, y.dtype))
            return (weight(layer, W) - W).to(y.dtype)

        return y + x @ layer.once("change", change).mT

    forward.follows = True  # pyright: ignore[reportFunctionMemberAccess]
    return forward


class Variant:
    """The contract of a method. Inheriting is optional: `@register` adds the missing members to any class.

    A method writes static methods, which take the target as `layer`: see `Layer`.

    Having a member is itself a fact: what has `factors` is exported and summed, what has `by_feature` gets grouped
    rows, what has `forward_input` rewrites its layer's input. So a base page has only the members that are meant on
    every page that inherits it; what some pages merely write alike is a function that they call.
    """

    # ---- identity and facts: read by the runtime, the docs and the tests
    name: ClassVar[str] = ""
    """What users type; letters, digits and underscores."""
    config: ClassVar[type[AdapterConfig]] = AdapterConfig
    """The dataclass of its options."""
    title: ClassVar[str] = ""
    """One line for tables; the first paragraph of the docstring by default."""
    paper: ClassVar[str] = ""
    """arXiv id or another citable source."""
    family: ClassVar[str] = "others"
    """The heading under which docs/methods.md lists it."""
    also: ClassVar[Mapping[str, str]] = {}
    """Other names of the same mathematics -> what the config says for them: `{"MHR": "splits=2 or more"}`."""
    site: ClassVar[str] = "linear"
    """Where it hooks: "linear", "block" (the residual stream after a decoder block), "embedding" (the input embedding
    unless named), "attention" (x: queries, y: what they attend to, (B, T, heads · head width) both, before the output
    projection; d_in is the width of the stream, d_out that of keys and values), "module" (what goes into a
    module that the config names, and what comes out)."""
    needs_weight: ClassVar[bool] = False
    """Reads `layer.weight`, at the start or in `forward`: `attach` then refuses a quantised target unless the config
    says `dequantize=True`, before it spends time on data."""
    needs_data: ClassVar[Literal["", "batches", "pairs", "adapters"]] = ""
    """`attach` without `calibration_data` raises; "pairs" are contrast pairs (positive batch, negative batch);
    "adapters" are low-rank updates of other adapters, as `ll.factors` gives them."""
    affine: ClassVar[bool] = True
    """For fixed adapter tensors the new output is an affine function of x: so it can be merged."""
    identity_bound: ClassVar[float] = 0.0
    """The largest relative departure of a fresh adapter from the base in fp32: 0, bit for bit; `inf`, by design."""
    own_weight: ClassVar[bool] = False
    """The adapter's weight in `ll.activate` is a variable of the page, `layer.strength`; otherwise the runtime blends
    the outputs with it."""
    noisy: ClassVar[bool] = False
    """Draws from torch's own generator in training, so that two training forwards differ; not in evaluation."""
    norms: ClassVar[bool] = False
    """The page also stands on a norm, where x is the normalised input, seen as one input per feature: x @ M has one row
    M (1, d_out)."""
    holds: ClassVar[Literal["", "factors", "modules"]] = ""
    """What the library itself keeps with this method: "factors", the sums of `ll.combine`; "modules", those of
    `train_modules`. One method each, and a subclass does not inherit it: the package's own have both."""
    ignores: ClassVar[tuple[str, ...]] = ()
    """Those of the common fields "r", "alpha" and "dropout" that the page does not use."""
    lr: ClassVar[float] = 1e-3
    """Recommended learning rate for AdamW."""
    width_growth: ClassVar[float] = 0.0
    """p where the first step at that rate changes the layer's outputs by a share that grows as width**p: with the start
    of its authors a method may not be free of the width, and a rate found at one width is then another at a second."""

    # ---- what follows from other members
    exact_identity: ClassVar[Derived] = Derived(lambda page: page.identity_bound == 0, "identity_bound")
    """A fresh adapter returns the base output bit for bit."""
    trains: ClassVar[Derived] = Derived(_trains, "param_specs")
    """Not so for a method that is fitted from data and has no trained tensor (steering vectors)."""

    # ---- the mathematics
    param_specs: Callable[[int, int, Any], dict[str, ParamSpec]]
    """`(d_in, d_out, cfg)` -> the tensors, named `lora_*`."""
    init: Callable[[Any, Any], None] | None = None
    """`(layer, cfg)`: fill `layer.lora_*` from `layer.weight`; runs once at attach, never at load."""
    group_init: Callable[[Any, Any, Any, Any], None] | None = None
    """`(model, targets, cfg, calibration_data)`: a start from data, on the untouched model; see `Targets`."""
    forward: Callable[[Any, Any, Any], Tensor] | None = None
    """`(layer, x, y) -> y_new`, x (..., d_in), y (..., d_out)."""
    forward_input: Callable[[Any, Any], Tensor] | None = None
    """`(layer, x) -> x_new`, before the base layer."""
    weight: Callable[[Any, Tensor], Tensor] | None = None
    """`(layer, W (d_out, d_in)) -> W'`, W in fp32 or better, for a method that needs the dense weight anyway: a plain
    layer then multiplies with W' once. `forward` follows from it, y + x (W' − W)ᵀ, and with it everything else. A page
    that writes `forward` too gives one function in two forms: W' while gradients are taken and nothing is dropped, its
    `forward` in every other case."""
    prefix: Callable[[Any], tuple[Tensor, Tensor]] | None = None
    """At the attention: `(layer) -> (K, V)`, keys and values (r, d_out), r = `cfg.r`, that every query sees before
    those of the text, whose positions begin after them."""
    tokens: Callable[[Any], Tensor] | None = None
    """At the attention of a causal model: `(layer) -> (n, d_in)`, embeddings of virtual tokens before the text; (B, n,
    d_in) where rows differ. They run through the model by themselves and end as keys and values of every layer, so that
    logits, labels, masks and the cache are those of the text alone."""
    factors: Callable[[Any], tuple[Tensor, Tensor]] | None = None
    """`(layer) -> (A (k, d_in), B (d_out, k))` with y_new = y + x Aᵀ Bᵀ, scale folded in: exact export, sums of
    adapters, grouped rows."""
    from_factors: Callable[[Any, Tensor, Tensor], None] | None = None
    """`(layer, A, B)`: write the inverse of `factors` into the staged tensors; the method can then start from
    `reference_weights`."""
    by_feature: Callable[[Any, str], tuple[Tensor, ...] | None] | None = None
    """`(layer, side) -> vectors (d,)`, or None on the side ("input", "output") where it does nothing. Goes with
    `act`."""
    act: Callable[..., Tensor] | None = None
    """`(cfg, v, *vectors) -> v_new`: what a method that works feature by feature does to x or y, also with one vector
    (n, 1, d) per row."""
    on_step: Callable[[Any, Any, int], None] | None = None
    """`(targets, cfg, step)`: after every optimiser step, gradients still there. `step` counts from 1 to
    `targets.total_steps` over the whole run, also across save and load; `view.master("lora_A")` is the parameter, with
    `.grad`."""
    compact: Callable[[Any, int | None], tuple[dict[str, Any], dict[str, Tensor]] | None] | None = None
    """`(layer, rank) -> (config changes, tensors)`, or None to leave the target out: the same function with fewer
    tensors. Files saved after the end of a schedule hold the result for rank None; `ll.compact` puts it on the
    model."""
    tied: Callable[[Any], AdapterConfig] | None = None
    """`(cfg) -> cfg` of the page on a linear layer that shares the target's weight, such as a tied head: it acts there
    too, with the same tensors."""
    penalty: Callable[[Any], Tensor] | None = None
    """`(layer) -> scalar` regulariser of the tensors; one that has seen the activations is left by `forward`, with
    `layer.add_penalty`."""
    shared_specs: Callable[[Any, Any], Shared] | None = None
    """`(targets, cfg)` -> the tensors that all targets share, or a list of `(targets, tensors)`: one entry per group
    that shares some, such as all targets of one `d_in`. Pages read them as `layer.lora_*`, like their own. They stand
    on the model itself and are saved once, under the first target of their group."""
