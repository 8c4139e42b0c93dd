"""Fused experts: E matrices in one parameter, adapted by weights that stand in for the stored ones while they run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..._torch import remove_hooks
from ...core.errors import size_text
from ..model.kind import Cell, Hooks, Kind, Part
from .bank import Bank, banks, banks_in


class ExpertCell(Cell):
    """One expert of a bank."""

    def __init__(self, bank: Bank, index: int) -> None:
        self.bank, self.index = bank, index

    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        return self.matrix(self.bank.weight.detach()).to(dtype), self.bias(dtype)

    def matrix(self, stored: Tensor) -> Tensor:
        return (stored.mT if self.bank.transposed else stored)[self.index]

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        b = self.bank.bias
        return None if b is None else b.detach()[self.index].to(dtype)

    def write(self, part: Part, block: Tensor) -> Tensor:
        stored = self.matrix(self.bank.weight.detach())
        stored[part] = block.to(stored.dtype)
        return stored[part]

    def write_bias(self, b: Tensor) -> None:
        if self.bank.bias is not None:
            self.bank.bias.data[self.index].copy_(b.to(self.bank.bias.dtype))


class Experts(Kind):
    """A `Bank`; d_in and d_out are those of one expert."""

    name = "experts"
    swaps_weight = True
    plain_vectors = True

    def size(self, module: nn.Module) -> tuple[int, int] | None:
        return (module.d_in, module.d_out) if isinstance(module, Bank) else None

    def find(self, model: nn.Module, d_model: int | None) -> Iterator[tuple[str, nn.Module]]:
        return iter(banks(model, d_model).items())

    def copies(self, module: nn.Module) -> int:
        return cast(Bank, module).n_experts

    def refuse(self, module: nn.Module, path: str, variant: Any, cfg: Any) -> str:
        reasons = {
            "is not affine in its layer's input": not variant.affine,
            "starts from data": variant.group_init is not None,
            "has a schedule over single matrices": variant.on_step is not None,
            "shares tensors between layers": variant.shared_specs is not None,
        }
        if why := next((reason for reason, holds in reasons.items() if holds), ""):
            return (
                f"variant {variant.name!r} {why}, so it cannot stand on fused experts; take {self.name!r} out of "
                "target_kinds."
            )
        if cfg.dropout:
            return "the experts' weight is adapted, not their input, so dropout has nothing to act on; set dropout=0."
        return ""

    def notes(self, modules: Sequence[nn.Module], variant: Any) -> list[str]:
        if variant.factors is not None and variant.forward_input is None:
            return []
        weights = [cast(Bank, m).weight for m in modules]
        size = size_text(sum(w.numel() * w.element_size() for w in weights))
        return [
            f"fused experts: training keeps their adapted weights ({size} over all layers) for the backward pass; with "
            "gradient checkpointing those of one layer at a time"
        ]

    def hooked(self, module: nn.Module) -> nn.Module:
        return module.__dict__["owner"]

    def join(self, module: nn.Module, path: str, hooks: Hooks) -> None:
        """Make the bank a child of the experts' module, whose hooks swap the adapted weights in."""
        owner = self.hooked(module)
        if not banks_in(owner):
            owner.register_forward_pre_hook(hooks.before, with_kwargs=True)
            owner.register_forward_hook(hooks.after, with_kwargs=True, always_call=True)
        owner.add_module(path.rpartition(".")[2], module)

    def part(self, module: nn.Module, path: str, hooks: Hooks) -> None:
        owner = self.hooked(module)
        del owner._modules[path.rpartition(".")[2]]
        if not banks_in(owner):
            remove_hooks(owner, {"_forward_pre_hooks": hooks.before, "_forward_hooks": hooks.after})

    def writable(self, module: nn.Module) -> bool:
        return True

    def as_matrix(self, module: nn.Module, stored: Tensor) -> Tensor:
        return stored.mT if cast(Bank, module).transposed else stored

    def as_stored(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return self.as_matrix(module, matrix)

    def cells(self, module: nn.Module, path: str) -> list[Cell]:
        bank = cast(Bank, module)
        return [ExpertCell(bank, e) for e in range(bank.n_experts)]

    def sample(self, module: nn.Module, rows: Tensor, columns: Tensor) -> Tensor:
        bank = cast(Bank, module)
        which = torch.arange(len(rows)) * bank.n_experts // len(rows)
        return bank.dense().detach()[which[:, None], rows, columns]
