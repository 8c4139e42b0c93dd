"""One layer of a folder in PEFT's layout, as a row of the table of types sees it, and what the row makes of it."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import AdapterConfig
from ..core.errors import FileError, listing, shown
from ..core.registry import get_variant, holder
from ..runtime.layers.read import read_weight
from ..runtime.layers.tensors import bias_of
from ..runtime.model.kind import Kind
from ..runtime.model.record import Record, Target
from ..runtime.model.site import Slot
from ..runtime.targets.choose import make_target
from ..runtime.view.composed import Composed
from ..runtime.view.layer import DenseView
from .header import check_scale
from .peft_names import Matcher

MAX_COUNT = 1 << 20
"""Of blocks, terms, iterations and the like in a file."""


@dataclass
class Site:
    """A layer and what the folder says of it. Every tensor must be taken by the row that reads the layer."""

    path: str
    module: nn.Module
    kind: Kind
    config: dict[str, Any]
    """adapter_config.json."""
    tensors: dict[str, Tensor]
    """The layer's own, by what stands behind its path: "lora_A.weight"."""
    shared: dict[str, Tensor]
    """Those of the whole model: "vera_A"."""
    sizes: dict[str, tuple[int, int]]
    """(d_in, d_out) of all adapted layers, in the model's order."""
    alone: bool
    """Whether every layer is a plain linear one without a trained bias, so that a method whose layers share tensors can
    stand on all."""
    match: Matcher
    where: str

    def __post_init__(self) -> None:
        self.d_in, self.d_out = self.kind.size(self.module) or (0, 0)
        self.widest_in = max((d_in for d_in, _ in self.sizes.values()), default=0)
        self.widest_out = max((d_out for _, d_out in self.sizes.values()), default=0)

    def take(self, name: str) -> Tensor:
        """A tensor of the layer, once, on the CPU and in fp32."""
        return self._float(self._taken(name), name)

    def numbers(self, name: str) -> Tensor:
        """A tensor of whole numbers, once, as int64."""
        found = self._taken(name)
        if found.is_floating_point() or found.dtype == torch.bool:
            raise FileError(f"{self.path}: {name} holds {found.dtype}, expected whole numbers.")
        return found.detach().cpu().long()

    def _taken(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise FileError(f"the file holds no {name} for {self.path}, only {listing(sorted(self.tensors))}.")
        return self.tensors.pop(name)

    def _float(self, t: Tensor, name: str) -> Tensor:
        if not t.is_floating_point():
            raise FileError(f"{self.path}: {name} holds {t.dtype}, expected floating numbers.")
        return t.detach().cpu().float()

    def maybe(self, name: str) -> Tensor | None:
        """`take`, or None where the file has none."""
        return self.take(name) if name in self.tensors else None

    def drop(self, *prefixes: str) -> None:
        """Leave aside what acts in training only."""
        for name in [n for n in self.tensors if n.startswith(prefixes)]:
            del self.tensors[name]

    def common(self, name: str) -> Tensor:
        """A tensor of the whole model."""
        if name not in self.shared:
            raise FileError(
                f"the file holds no {name}, which is drawn anew from a seed by PEFT. Save it in PEFT "
                "with save_projection=True."
            )
        t = self.shared[name]
        return self._float(t, name) if t.is_floating_point() else t.detach().cpu().long()

    def option(self, name: str, pattern: str = "", default: Any = None) -> Any:
        """A field of the config, or what the last matching entry of its pattern field says of this layer."""
        value = self.config.get(name, default)
        return self.match.value(self.config.get(pattern), self.path, value) if pattern else value

    def number(self, name: str, pattern: str = "", default: float | None = None) -> float:
        """`option`, checked to be a number."""
        value = self.option(name, pattern, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise FileError(f"{name} must be a number, got {shown(value)}.")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """`option`, checked to be true or false; null is the default."""
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            raise FileError(f"{name} must be true or false, got {shown(value)}.")
        return default if value is None else value

    def count(self, name: str, pattern: str = "", default: int | None = None, least: int = 1) -> int:
        """`number`, checked to be a whole one of a size that does no harm."""
        value = self.number(name, pattern, default)
        if not isinstance(value, int) or not least <= value <= MAX_COUNT:
            raise FileError(f"{name} must be a whole number from {least} on, got {shown(value)}.")
        return value

    @property
    def weight(self) -> Tensor:
        """W (d_out, d_in) in fp32."""
        return read_weight(self.module, self.path, torch.float32).detach().cpu()

    @property
    def bias(self) -> Tensor | None:
        """The base's bias in fp32."""
        b = bias_of(self.module)
        return None if b is None else b.detach().float().cpu()

    @property
    def transposed(self) -> bool:
        """Whether PEFT adapts the stored parameter (`target_parameters`), and the layer stores Wᵀ."""
        names = self.config.get("target_parameters") or []
        if not any(f".{self.path}.weight".endswith(f".{n}") for n in names):
            return False
        w = self.module._parameters["weight"]
        assert w is not None
        return tuple(w.shape) == (self.d_in, self.d_out) and (
            self.d_in != self.d_out or self.kind.as_matrix(self.module, w).stride() != w.stride()
        )


@dataclass
class Reading:
    """What a layer of the folder is here."""

    variant: str
    """Name of the method."""
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """Fields of its config on this layer."""
    values: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Its tensors, in the shapes that its page declares."""
    shared: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Those that it shares with other layers."""
    bias: Tensor | None = None
    """What is added to the layer's bias beside the method."""
    same: bool = True
    """The method is the one PEFT trains; otherwise only the function is the same."""


def difference(weight: Tensor, bias: Tensor | None = None) -> Reading:
    """A change of the weight and of the bias: what every affine method amounts to."""
    whole = holder("modules")
    values = {"lora_W": weight} if bias is None else {"lora_W": weight, "lora_b": bias}
    return Reading(whole.name, {"bias": bias is not None}, values, same=False)


def target_on(site: Site, reading: Reading, cfg: AdapterConfig) -> tuple[Target, dict[str, Tensor]]:
    """The target that a reading makes of its layer, and its tensors; as a change of the weight where the method's page
    cannot stand on this kind of layer.

    Raises:
        FileError: the tensors have other shapes than the page declares.
    """
    method = get_variant(reading.variant)
    own = cfg if method.name == cfg.variant else method.config(variant=method.name, dtype=cfg.dtype, seed=cfg.seed)
    own = dataclasses.replace(own, **reading.options)
    check_scale(own.scale, site.path)
    target = make_target(site.path, site.d_in, site.d_out, own, site.kind.name)
    _check_shapes(site, target, reading.values)
    values = reading.values | reading.shared
    if not _stands(site, target, values) or reading.bias is not None:
        folded = difference(*_change(site, target, reading))
        if why := site.kind.refuse(site.module, site.path, get_variant(folded.variant), own):
            raise FileError(f"{site.path}: {why}")
        return target_on(site, folded, cfg)
    return target, values


def _check_shapes(site: Site, target: Target, values: dict[str, Tensor]) -> None:
    want = {k: tuple(s.shape) for k, s in target.specs.items()}
    got = {k: tuple(t.shape) for k, t in values.items()}
    if want != got:
        raise FileError(
            f"{site.path} is {site.d_in}->{site.d_out}, which asks {target.variant.name!r} for {want}; "
            f"the file's tensors make {got}."
        )


@torch.no_grad()
def _stands(site: Site, target: Target, values: dict[str, Tensor]) -> bool:
    """Whether the method's page can stand on this kind of layer."""
    if site.kind.refuse(site.module, site.path, target.variant, target.cfg):
        return False
    page, pair = target.variant.forward, site.kind.trial(site.module, torch.float32, site.d_out)
    if page is None or pair is None:
        return True
    device = pair[1].device
    slot = Slot(Record("default", target.variant, target.cfg, {target.path: target}), target, {})
    there = {k: t.to(device) for k, t in values.items()}
    try:
        weight = torch.zeros(site.d_out, site.d_in, device=device)  # it is asked for what it does with x alone
        page(DenseView(site.module, slot, weight, bias_of(site.module), there), *pair)
    except (TypeError, NotImplementedError):
        return False
    return True


@torch.no_grad()
def _change(site: Site, target: Target, reading: Reading) -> tuple[Tensor, Tensor | None]:
    """What a page does to W and b, read off its own forward on a dense layer of this size."""
    w = site.weight.double()
    b = w.new_zeros(site.d_out) if site.bias is None else site.bias.double()
    record = Record("default", target.variant, target.cfg, {target.path: target})
    slot = Slot(record, target, {})
    exact = {k: t.double() if t.is_floating_point() else t for k, t in (reading.values | reading.shared).items()}
    layer = nn.Linear(site.d_in, site.d_out, device="meta")
    f = Composed([(slot, 1.0, DenseView(layer, slot, w, b, exact))], w, b)
    start = f(w.new_zeros(1, site.d_in))
    new = (f(torch.eye(site.d_in, dtype=w.dtype)) - start).mT
    change = start[0] - b + (0.0 if reading.bias is None else reading.bias.double())
    if site.bias is None and not bool(change.any()):
        return (new - w).float(), None
    return (new - w).float(), change.float()
