"""A budget of rank-one parts that shrinks over training: its config, its course, and the choice of the parts that
live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import AdapterConfig, ConfigError


@dataclass(frozen=True, kw_only=True)
class BudgetConfig(AdapterConfig):
    r: int = 12
    """Rank at the start."""
    target_r: int | None = None
    """Mean rank at the end; None means two thirds of the smallest r."""
    tinit: int = 0
    """Optimiser steps before the pruning begins."""
    tfinal: int = 0
    """Optimiser steps at the end during which the chosen triplets stay fixed."""
    delta_t: int = 1
    """Prune every so many steps."""
    done: bool = False
    """The schedule is over and only live triplets are left; written by `ll.save` and `ll.compact`."""

    def validate(self) -> None:
        super().validate()
        name = type(self).__name__
        if not self.done and not 1 <= self.final_r <= min((self.r, *self.rank_pattern.values())):
            raise ConfigError(f"{name}.target_r must lie between 1 and every rank (r={self.r}), got {self.final_r}.")
        if self.tinit < 0 or self.tfinal < 0 or self.delta_t < 1:
            raise ConfigError(f"{name}.tinit and tfinal must not be negative, and delta_t must be at least 1.")

    @property
    def final_r(self) -> int:
        """The mean rank at the end."""
        return max(1, 2 * min((self.r, *self.rank_pattern.values())) // 3) if self.target_r is None else self.target_r

    def last_pruning(self, total_steps: int) -> int:
        """The step T − tfinal, after which the choice is fixed."""
        end = total_steps - self.tfinal
        if self.tinit >= end:
            raise ConfigError(
                f"{type(self).__name__}: tinit={self.tinit} and tfinal={self.tfinal} leave no step of "
                f"total_steps={total_steps} to prune in."
            )
        return end

    def prunes_at(self, step: int, end: int) -> bool:
        return self.tinit < step <= end and (step % self.delta_t == 0 or step == end)


def budget(step: int, cfg: BudgetConfig, end: int, first: int, last: int) -> int:
    """b(t) = last + (first − last)(1 − (t − tinit)/(end − tinit))³: how many parts live, over all targets."""
    if step <= cfg.tinit:
        return first
    left = 1 - (step - cfg.tinit) / (end - cfg.tinit)
    return int(last + (first - last) * left**3)


def best(scores: Sequence[Tensor], b: int) -> tuple[Tensor, ...]:
    """For each target a mask (r,) of its parts among the b best of all targets."""
    order = torch.cat([s.to(scores[0].device) for s in scores]).argsort(descending=True, stable=True)
    live = torch.zeros_like(order, dtype=torch.bool)
    live[order[:b]] = True
    return torch.split(live, [len(s) for s in scores])
