"""Tensors that stand before a module's own while it runs: one thread at a time, since a second one that runs the same
module would meet them, or miss them."""

from __future__ import annotations

import threading
import time

from torch import Tensor, nn

from ..._torch import modules_called_elsewhere

_holders: dict[nn.Module, tuple[int, list[str]]] = {}
"""Module -> (the thread that has put tensors before its own, their attributes)."""


def swap_in(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Let these stand before the module's own, as soon as no other thread's do."""
    mine = threading.get_ident(), list(tensors)
    while (holder := _holders.setdefault(module, mine)) is not mine and holder[0] != mine[0]:
        if module not in modules_called_elsewhere():  # its call was broken off, say by Ctrl-C
            swap_back(module)
        else:
            time.sleep(1e-4)
    _holders[module] = mine
    module.__dict__.update(tensors)


def swap_out(module: nn.Module) -> bool:
    """The module's own tensors again; whether this thread had put others before them."""
    holder = _holders.get(module)
    if holder is None or holder[0] != threading.get_ident():
        return False
    swap_back(module)
    return True


def swap_back(module: nn.Module) -> None:
    """The module's own tensors again, whoever has put others before them: what a broken call left."""
    holder = _holders.get(module)
    for attribute in () if holder is None else holder[1]:
        module.__dict__.pop(attribute, None)
    _holders.pop(module, None)
