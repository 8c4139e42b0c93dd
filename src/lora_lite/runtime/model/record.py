"""One adapter and its targets: plain data, no references to modules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...core.config import AdapterConfig
from ...core.registry import get_variant
from ...core.spec import ParamSpec
from ...core.variant import Variant


@dataclass(slots=True)
class Target:
    """One adapter on one layer: its path, shape, config and tensors."""

    path: str
    d_in: int
    d_out: int
    cfg: AdapterConfig
    specs: dict[str, ParamSpec]
    kind: str
    experts: int = 0
    """Number of experts, whose tensors are stacked along dimension 0; 0 for anything else."""
    shared: dict[str, str] = field(default_factory=dict)
    """Short tensor name -> path of the target that owns it, for tensors shared between targets; on the owner too."""
    base: dict[str, Any] = field(default_factory=dict)
    """Fingerprint of the base weight."""
    tied: str = ""
    """Path of the target whose weight this layer shares and whose tensors act here too."""

    def share(self, other: Target) -> None:
        """Take what is equal from another adapter's target on the same layer: a thousand adapters of one kind need it
        once."""
        self.path = other.path
        if self.cfg == other.cfg:
            self.cfg = other.cfg
        if self.specs == other.specs:
            self.specs = other.specs
        if self.base == other.base:
            self.base = other.base

    @property
    def variant(self) -> type[Variant]:
        """The method on this layer: the adapter's own, or that of a module trained whole beside it."""
        return get_variant(self.cfg.variant)

    def key(self, short: str) -> str:
        """Full path of one of its tensors, without the adapter's name: its key in files."""
        return f"{self.path}.{short}" if self.path else short


@dataclass
class Record:
    """One named adapter."""

    name: str
    variant: type[Variant]
    cfg: AdapterConfig
    targets: dict[str, Target]
    trainable: bool = True
    steps: int = 0
    """How often its schedule was stepped."""
    total_steps: int = 0
    """Length of its schedule."""
    scheduled: bool = False
    """Whether an optimiser drives the schedule. Not copied: the optimiser drives the original."""
    schedule_number: int = 0
    """Counts `ll.schedule` calls: only the last one's hook acts."""
    cast_noticed: bool = False
    """Whether a cast of its tensors by `model.to(dtype)` was warned about."""
    train_calls: int = 0
    """Training forwards without anybody who drives the schedule."""

    @property
    def beside(self) -> list[Target]:
        """Targets of another method than the adapter's own: what `train_modules` names."""
        return [t for t in self.targets.values() if self.stands_beside(t)]

    def stands_beside(self, target: Target) -> bool:
        """Whether it is of another method than the adapter's own."""
        return target.cfg.variant != self.cfg.variant

    def __getstate__(self) -> dict[str, Any]:
        # the method travels by its name, so that a class written in a notebook or a function does too
        return {**self.__dict__, "scheduled": False, "variant": self.variant.name}

    def __setstate__(self, data: dict[str, Any]) -> None:
        self.__dict__.update(data, variant=get_variant(data["variant"]))
