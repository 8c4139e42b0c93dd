"""Adapter tensors before they are on the model: everything that can fail happens here, so an attach is all or
nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.config import AdapterConfig
from ...core.errors import StateError, TargetError, WeightError
from ..layers.bank import banks
from ..layers.kinds import device_of, stored_weight
from ..layers.virtual import Lookup, Normed, VirtualInput, wrap
from ..model.record import Record, Target
from ..model.site import Slot
from ..targets.choose import article, make_target
from ..targets.structure import describe
from ..view.layer import StagedView, generator_for


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


class TrialView(StagedView):
    """A staged target as a page sees it: tensors cast to the layer's dtype."""

    def __init__(self, staged: StagedTarget) -> None:
        dtype = stored_weight(staged.module).dtype
        cast = {k: t.to(dtype) if t.is_floating_point() else t for k, t in staged._staged.items()}
        super().__init__(staged.module, staged._slot, cast)


def modules_of(model: nn.Module, targets: Iterable[Target]) -> dict[str, nn.Module]:
    """Path -> the target's layer; a bank of fused experts is made here, and joins the model when the attach
    succeeds."""
    targets = list(targets)
    fused = banks(model, describe(model).d_model) if any(t.experts for t in targets) else {}
    return {t.path: fused[t.path] if t.experts else model.get_submodule(t.path) for t in targets}


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


@torch.no_grad()
def filled(model: nn.Module, record: Record, values: Mapping[str, Tensor]) -> list[StagedTarget]:
    """Staged targets with these values, which are found by `Target.key`.

    Raises:
        StateError: a target lies on the meta device, or a value has another shape.
    """
    staged = stage(model, record, fill=False)
    for view in staged:
        for short, t in view.tensors.items():
            if t.is_meta:
                raise StateError(f"{view.path} lies on the meta device; load the base weights before the adapter.")
            setattr(view, short, values[view.target.key(short)])
    return staged


def probe(
    kind: str, module: nn.Module, dtype: torch.dtype, d_out: int, device: torch.device
) -> tuple[VirtualInput, Tensor]:
    """A tiny (x, y) to try a page on."""
    m: Any = module
    if kind == "embedding":
        ids = torch.zeros(2, 3, dtype=torch.long, device=device)
        return Lookup(ids, m.num_embeddings, dtype), torch.zeros(2, 3, d_out, dtype=dtype, device=device)
    if kind == "norm":
        n = torch.zeros(2, 3, d_out, dtype=dtype, device=device)
        return Normed(n), n
    size = [max(8, d * (k - 1) + 1) for k, d in zip(m.kernel_size, m.dilation, strict=True)]
    x = torch.zeros(2, m.in_channels, *size, dtype=m.weight.dtype, device=device)
    with torch.no_grad():
        y = m.forward(x).to(dtype)
    return wrap(module, kind, x.to(dtype), y)


def try_page(page: Any, view: Any, module: nn.Module, kind: str, device: torch.device, d_out: int) -> None:
    """Run a page once on a tiny virtual input; raises `TargetError` when it does more than multiply x by a matrix."""
    dtype = module.weight.dtype  # type: ignore[union-attr]
    x, y = probe(kind, module, dtype, d_out, device)  # type: ignore[arg-type]
    try:
        page(view, x, y)
    except (TypeError, NotImplementedError) as e:
        raise TargetError(
            f"{view.path}: variant {view.cfg.variant!r} does more with its input than multiply it by a matrix ({e}), "
            f"so it cannot adapt {article(kind)}; take it out of target_kinds."
        ) from None
