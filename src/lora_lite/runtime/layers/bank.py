"""Experts whose weights are one fused parameter (E, d_out, d_in) of their module, as transformers keeps them since
version 5.

Such a parameter is no layer: nothing can be hooked, and no tensor can live on it. A `Bank` stands for it: a small child
of the experts' module that holds the adapters' tensors (lora_A (E, r, d_in), ...) and no weight of its own. The base's
keys stay as they are.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from ..model.site import base_attributes

PREFIX = "lora_"
"""`experts.gate_up_proj` is adapted by the child `experts.lora_gate_up_proj`."""
READS = re.compile(r"(gate_up|gate|up|w1|w3|wi)(_proj)?(_weight)?$")
WRITES = re.compile(r"(down|w2|wo)(_proj)?(_weight)?$")


class Bank(nn.Module):
    """E linear layers d_in -> d_out inside one parameter of `owner`."""

    def __init__(self, owner: nn.Module, parameter: str, transposed: bool) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # not a child: the owner is the parent
        self.parameter, self.transposed = parameter, transposed
        shape = self.dense().shape
        self.n_experts, self.d_out, self.d_in = (int(n) for n in shape)
        self.training = owner.training

    @property
    def weight(self) -> Tensor:
        """The fused parameter as it is stored."""
        return self.__dict__["owner"]._parameters[self.parameter]

    @property
    def bias(self) -> Tensor | None:
        """(E, d_out), where the experts have one."""
        return self.__dict__["owner"]._parameters.get(f"{self.parameter}_bias")

    def dense(self) -> Tensor:
        """The weight seen as (E, d_out, d_in), without a copy."""
        return self.weight.mT if self.transposed else self.weight

    def stored(self, dense: Tensor) -> Tensor:
        """The inverse of `dense`."""
        return dense.mT if self.transposed else dense

    def extra_repr(self) -> str:
        return f"{self.n_experts} x ({self.d_in}->{self.d_out}) of {self.parameter}"


def banks_in(owner: nn.Module) -> list[Bank]:
    """The banks among the children of an experts' module."""
    return [m for m in owner._modules.values() if isinstance(m, Bank)]


def banks(model: nn.Module, d_model: int | None = None) -> dict[str, Bank]:
    """Path -> bank of every fused parameter whose orientation is known: from the module's `is_transposed`, or from the
    model's width."""
    found: dict[str, Bank] = {}
    for path, module in model.named_modules():
        if isinstance(module, Bank):
            continue
        for name in base_attributes(module):
            p = module._parameters.get(name)
            if p is None or p.dim() != 3 or not p.is_floating_point() or type(p.data) is not Tensor:
                continue
            if name.startswith(PREFIX) or not _holds_experts(module, p.shape[0]):
                continue
            key = f"{path}.{PREFIX}{name}" if path else f"{PREFIX}{name}"
            there = module._modules.get(PREFIX + name)
            if isinstance(there, Bank):
                found[key] = there
            elif (transposed := _transposed(module, name, p.shape[1:], d_model)) is not None:
                found[key] = Bank(module, name, transposed)
    return found


def _holds_experts(module: nn.Module, n: int) -> bool:
    counts = (getattr(module, k, None) for k in ("num_experts", "n_experts", "num_local_experts", "n_routed_experts"))
    return "expert" in type(module).__name__.lower() and any(c == n for c in counts)


def _transposed(module: nn.Module, name: str, shape: Any, d_model: int | None) -> bool | None:
    """Whether it stores (E, d_in, d_out); None where nothing says so."""
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    first, last = shape
    if first == last or d_model not in (first, last):
        return None
    if READS.search(name):
        return first == d_model
    return last == d_model if WRITES.search(name) else None
