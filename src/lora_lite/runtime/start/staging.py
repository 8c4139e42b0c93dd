"""Adapter tensors before they are on the model: everything that can fail happens here, so an attach is all or
nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..._torch import is_fake
from ...core.config import AdapterConfig
from ...core.errors import StateError, TargetError, WeightError
from ...core.files import is_finite
from ...ops.linalg import DecompositionError
from ..layers.kinds import kind_named
from ..layers.sound import fault
from ..layers.tensors import device_of, stored_dtype
from ..model.kind import Kind
from ..model.record import Record, Target
from ..model.site import Slot
from ..model.surroundings import own_surroundings
from ..targets.choose import make_target
from ..targets.structure import describe
from ..view.composed import Composed
from ..view.expert import sliced
from ..view.layer import DenseView, StagedView, generator_for


class StagedTarget(StagedView):
    """What `init` and `group_init` see of one target: the layer view plus rank changes. Its tensors move onto the layer
    at the end."""

    def __init__(self, module: nn.Module, record: Record, target: Target, fill: bool = True) -> None:
        super().__init__(module, Slot(record, target, {}), {})
        self._record = record
        self._fill = fill
        self.target = target
        self.device = device_of(module)
        self._allocate()

    @property
    def module(self) -> nn.Module:
        """The bare layer, for calibration hooks."""
        return self._module

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Short name -> staged tensor, of those that this target owns."""
        return {short: self._staged[short] for short in self.target.specs}

    def each(self) -> Iterator[StagedView]:
        """The view itself, or one for each of several matrices, on a linear layer that shows its weight."""
        if not self.target.experts:
            yield self
            return
        for cell in kind_named(self.target.kind).cells(self._module, self.path):
            w, _ = cell.read(stored_dtype(self._module))
            layer = nn.Linear(*w.shape[::-1], bias=False, device="meta")
            layer.weight = nn.Parameter(w, requires_grad=False)
            yield StagedView(layer, self._slot, sliced(self._staged, cell))

    def resize(self, **changes: Any) -> None:
        """Replace fields of this target's config (say `r=4, alpha=8`) and draw its tensors anew."""
        cfg: AdapterConfig = dataclasses.replace(self.cfg, **changes)
        old = self.target
        self.target = make_target(old.path, old.d_in, old.d_out, cfg, old.kind)
        self.target.shared = old.shared
        self.target.specs |= {short: spec for short, spec in old.specs.items() if short in old.shared}
        self._slot = Slot(self._record, self.target, {})
        self.cfg = cfg
        self._allocate()

    def _allocate(self) -> None:
        shared = {short: t for short, t in self._staged.items() if short in self.target.shared}
        self._staged.clear()
        self._staged.update(shared)
        for short, spec in self.target.specs.items():
            if short in shared:
                continue
            dtype = spec.dtype or self.cfg.torch_dtype
            if self.device.type == "meta" or not self._fill:
                self._staged[short] = torch.empty(spec.shape, dtype=dtype, device=self.device)
                continue
            t = torch.empty(
                spec.shape, dtype=torch.float32 if dtype.is_floating_point and dtype != torch.float64 else dtype
            )
            if self.target.experts:  # one draw each, or a fan-in would be counted over all of them
                for e, part in enumerate(t):
                    spec.fill(part, generator_for(self.cfg.seed, self.target.path, short, str(e)))
            else:
                spec.fill(t, generator_for(self.cfg.seed, self.target.path, short))
            self._staged[short] = t.to(device=self.device, dtype=dtype)


def modules_of(model: nn.Module, targets: Iterable[Target]) -> dict[str, nn.Module]:
    """Path -> the target's layer. A layer that is no module of the model yet, as a bank of experts, is made here and
    joins the model when the attach succeeds."""
    targets = list(targets)
    modules = dict(model.named_modules())
    absent = {t.kind for t in targets if t.path not in modules}
    if absent:
        d_model = describe(model).d_model
        for name in absent:
            modules |= dict(kind_named(name).find(model, d_model))
    return {t.path: modules[t.path] for t in targets}


def stage(model: nn.Module, record: Record, fill: bool = True) -> list[StagedTarget]:
    """Unregistered tensors for every target of a record, drawn but not yet initialised by the variant."""
    offloaded = any("_hf_hook" in m.__dict__ for m in model.modules())  # accelerate may have put everything on meta
    whole_on_meta = not offloaded and all(p.is_meta for p in model.parameters())
    staged, modules = [], modules_of(model, record.targets.values())
    for target in record.targets.values():
        view = StagedTarget(modules[target.path], record, target, fill)
        if view.device.type == "meta" and not whole_on_meta:
            raise WeightError(
                f"{target.path}: its weight is on the meta device (accelerate offload), so the adapter would run on "
                "weights that are not there. Attach before dispatching the model, or load it without offloading."
            )
        staged.append(view)
    views = {view.path: view for view in staged}
    for view in staged:
        view._staged.update({k: views[owner]._staged[k] for k, owner in view.target.shared.items()})
    return staged


@own_surroundings()
def filled(model: nn.Module, record: Record, values: Iterable[tuple[str, Tensor]]) -> list[StagedTarget]:
    """Staged targets with copies of these values, (`Target.key`, tensor) of each, which are taken one after the other.

    Raises:
        StateError: a target lies on the meta device, or a value has another shape.
    """
    staged = stage(model, record, fill=False)
    places: dict[str, tuple[StagedTarget, str]] = {}
    for view in staged:
        for short, t in view.tensors.items():
            if t.is_meta:
                raise StateError(f"{view.path} lies on the meta device; load the base weights before the adapter.")
            places[view.target.key(short)] = view, short
    for key, value in values:
        view, short = places.pop(key)
        setattr(view, short, value)
    assert not places, f"no value was given for {list(places)}"
    return staged


def start(view: StagedTarget) -> None:
    """Fill one target's tensors by the page's `init`, and try the page where its layer is no plain product.

    Raises:
        TargetError: the page does more with its input, or changes more of its layer, than this kind of layer offers.
    """
    kind, init = kind_named(view.target.kind), view.target.variant.init
    if init is not None:
        with exactly(view.device.type):
            _by_page(view, init)
    if view.device.type == "meta":
        return
    if kind.swaps_weight:
        _try_without_bias(view, kind)
    _try_page(view, kind)


def _by_page(view: StagedTarget, init: Callable[..., None]) -> None:
    try:
        for one in view.each():
            init(one, one.cfg)
    except DecompositionError as e:
        raise WeightError(f"{view.path}: variant {view.cfg.variant!r} could not decompose its weight: {e}") from e
    check_started(view)


def check_started(view: StagedTarget) -> None:
    """Raise where a start left something that is not finite.

    Raises:
        WeightError: names the layer, and what is wrong with its weight.
    """
    bad = next((short for short, t in view.tensors.items() if not t.is_meta and not _is_finite(t)), None)
    if bad is None:
        return
    w = getattr(view.module, "weight", None)
    why = fault(w) if isinstance(w, Tensor) else ""
    raise WeightError(
        f"{view.path}: variant {view.cfg.variant!r} starts with {bad} that is not finite, since "
        f"{'the weight ' + why if why else 'the numbers it starts from are not'}. Look at the checkpoint; or leave the "
        f"layer out: exclude_names=({view.path!r},)."
    )


def _is_finite(t: Tensor) -> bool:
    return not t.is_floating_point() or is_fake(t) or is_finite(t)


def exactly(device: str) -> AbstractContextManager[Any]:
    """Without autocast: what training begins from is not rounded to 16 bits."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _try_page(view: StagedTarget, kind: Kind) -> None:
    page, dtype = view.target.variant.forward, stored_dtype(view.module)
    pair = None if page is None else kind.trial(view.module, dtype, view.target.d_out)
    if page is None or pair is None:
        return
    cast = {k: t.to(dtype) if t.is_floating_point() else t for k, t in view._staged.items()}
    try:
        page(StagedView(view.module, view._slot, cast), *pair)
    except (TypeError, NotImplementedError) as e:
        article = "an" if kind.name[0] in "aeiou" else "a"
        raise TargetError(
            f"{view.path}: variant {view.cfg.variant!r} does more with its input than multiply it by a matrix ({e}), "
            f"so it cannot adapt {article} {kind.name}; take it out of target_kinds."
        ) from None


def _try_without_bias(view: StagedTarget, kind: Kind) -> None:
    """Raise when the page adds a bias and the layer, whose weights are swapped, has none to hold it."""
    cell = kind.cells(view.module, view.path)[0]
    w, b = cell.read(torch.float32)
    if b is not None:
        return
    g = torch.Generator().manual_seed(0)
    tensors = sliced(view.tensors, cell)
    for k, t in tensors.items():
        if t.is_floating_point():
            tensors[k] = t.float() + 0.1 * torch.randn(t.shape, generator=g).to(t.device)
    f = Composed([(view._slot, 1.0, DenseView(view.module, view._slot, w, None, tensors))], w, None)
    if bool(f(w.new_zeros(1, w.shape[1])).any()):
        raise TargetError(
            f"{view.path}: variant {view.cfg.variant!r} adds a bias, and these {kind.name} have none; take "
            f"{kind.name!r} out of target_kinds."
        )
