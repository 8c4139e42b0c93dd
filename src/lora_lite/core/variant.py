"""`Variant`: what an adapter method may say about itself. Everything but `name`, `param_specs` and a forward has a
default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from .config import AdapterConfig
from .spec import ParamSpec


class Variant:
    """The contract of a method. Inheriting is optional: `@register` adds the missing members to any class.

    A method writes static methods. `layer` is the target as this adapter sees it (`runtime.view.layer.LayerView`):
    `layer.lora_A` is this adapter's tensor in y's dtype, `layer.master("lora_A")` its stored precision, `layer.weight`
    the dense `(d_out, d_in)` weight whatever the layer stores, `layer.cfg` the config with this target's rank and
    alpha.
    """

    # ---- identity and facts: read by the runtime, the docs and the tests
    name: ClassVar[str] = ""
    """What configs, files and the command line call it: letters, digits, underscores."""
    config: ClassVar[type[AdapterConfig]] = AdapterConfig
    """The dataclass of its hyperparameters."""
    title: ClassVar[str] = ""
    """One line for tables; the first line of the docstring by default."""
    paper: ClassVar[str] = ""
    """arXiv id or another citable source."""
    site: ClassVar[str] = "linear"
    """Where it hooks: "linear", "block" (the residual stream after a decoder block), "embedding" (the input embedding
    unless named)."""
    needs_weight: ClassVar[bool] = False
    """Reads `layer.weight`: a quantised target then asks for `dequantize=True`."""
    needs_data: ClassVar[bool] = False
    """`attach` without `calibration_data` raises."""
    needs_pairs: ClassVar[bool] = False
    """Its calibration data is a list of contrast pairs (positive batch, negative batch)."""
    trains: ClassVar[bool] = True
    """False for a method that is fitted from data and has no trained tensor (steering vectors)."""
    affine: ClassVar[bool] = True
    """For fixed adapter tensors the new output is an affine function of x: so it can be merged."""
    exact_identity: ClassVar[bool] = True
    """A fresh adapter returns the base output bit for bit."""
    identity_bound: ClassVar[float] = 0.0
    """Otherwise: the largest relative departure of a fresh adapter in fp32 (`inf`: departs by design)."""
    own_weight: ClassVar[bool] = False
    """The adapter's weight in `ll.activate` is a variable of the page, `layer.strength`; otherwise the runtime blends
    the outputs with it."""
    norms: ClassVar[bool] = False
    """The page also stands on a norm, where x is the normalised input, seen as one input per feature: x @ M has one row
    M (1, d_out)."""
    whole: ClassVar[bool] = False
    """Trains every parameter of its layers: what `train_modules` puts beside another method."""
    lr: ClassVar[float] = 1e-3
    """Recommended learning rate for AdamW."""
    cost: ClassVar[str] = ""
    """Extra multiply-adds per token and target, as a formula."""

    # ---- the mathematics
    param_specs: ClassVar[Callable[[int, int, Any], dict[str, ParamSpec]]]
    """`(d_in, d_out, cfg)` -> the tensors, named `lora_*`."""
    init: ClassVar[Callable[..., Any] | None] = None
    """`(layer, cfg)`: fill `layer.lora_*` from `layer.weight`; runs once at attach, never at load."""
    group_init: ClassVar[Callable[..., Any] | None] = None
    """`(model, targets, cfg, calibration_data)`: a start from data, on the untouched model."""
    forward: ClassVar[Callable[..., Any] | None] = None
    """`(layer, x, y) -> y_new`."""
    forward_input: ClassVar[Callable[..., Any] | None] = None
    """`(layer, x) -> x_new`, before the base layer."""
    factors: ClassVar[Callable[..., Any] | None] = None
    """`(layer) -> (A (k, d_in), B (d_out, k))` with y_new = y + x Aᵀ Bᵀ, scale folded in: exact export, sums of
    adapters, grouped rows."""
    from_factors: ClassVar[Callable[..., Any] | None] = None
    """`(layer, A, B)`: write the inverse of `factors` into the staged tensors; the method that holds combined adapters
    has it."""
    by_feature: ClassVar[Callable[..., Any] | None] = None
    """`(layer, side) -> vectors (d,)`, or None on the side ("input", "output") where it does nothing; with
    `act`."""
    act: ClassVar[Callable[..., Any] | None] = None
    """`(cfg, v, *vectors) -> v_new`: what a method that works feature by feature does to x or y, also with one vector
    (n, 1, d) per row."""
    on_step: ClassVar[Callable[..., Any] | None] = None
    """`(targets, cfg, step)`: after every optimiser step, gradients still there. `step` counts from 1 to
    `targets.total_steps` over the whole run, also across save and load; `view.master("lora_A")` is the parameter, with
    `.grad`."""
    compact: ClassVar[Callable[..., Any] | None] = None
    """`(layer, rank) -> (config changes, tensors)`, or None to leave the target out: the same function with fewer
    tensors. Files saved after the end of a schedule hold the result for rank None; `ll.compact` puts it on the
    model."""
    tied: ClassVar[Callable[..., Any] | None] = None
    """`(cfg) -> cfg` of the page on a linear layer that shares the target's weight, such as a tied head: it acts there
    too, with the same tensors."""
    penalty: ClassVar[Callable[..., Any] | None] = None
    """`(layer) -> scalar` regulariser."""
    shared_specs: ClassVar[Callable[..., Any] | None] = None
    """`(targets, cfg)`: tensors shared by all targets; the first one owns them."""
