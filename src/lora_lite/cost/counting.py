"""Operations and saved activations of a run on tensors without values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import counts_tensors, cpu_attention, storage_key
from ..runtime.targets.structure import describe


@counts_tensors
def _in_place(*shapes: Any, out_val: Any = None, **_: Any) -> int:
    """Operations of `out.addmm_(a, b)` and `out.baddbmm_(a, b)`, which torch's counter does not know."""
    _, a, b = (t.shape for t in shapes)
    return 2 * math.prod(a) * b[-1]


def _attention(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Q Kᵀ and P V of one call of the CPU's attention kernel, which torch's counter does not know; q (B, H, T, d), k
    (B, H, S, d), v (B, H, S, e)."""
    rows, heads, T, d = q
    return 2 * rows * heads * T * k[-2] * (d + v[-1])


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Q Kᵀ again, and two products for each of the two, as torch counts its other kernels."""
    rows, heads, T, d = q
    return 2 * rows * heads * T * k[-2] * (3 * d + 2 * v[-1])


def counter() -> Any:
    """`torch.utils.flop_counter.FlopCounterMode`, which also counts products that add in place and attention on a
    CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten
    attention, attention_backward = cpu_attention()
    more = {
        aten.addmm_: _in_place,
        aten.baddbmm_: _in_place,
        attention: _attention,
        attention_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=more)


class Saved:
    """What autograd keeps between the passes: unique storages, and in which block each is kept."""

    def __init__(self, model: nn.Module, own: set[int], length: int) -> None:
        self.own, self.length = own, length
        self.bytes: dict[int, int] = {}
        self.kept: list[Tensor] = []  # a storage that lives keeps its address, which is the key
        self.inputs: set[int] = set()
        self.inside: dict[int | None, set[int]] = {}
        self.block: int | None = None
        self.blocks = describe(model).blocks

    def pack(self, t: Tensor) -> Tensor:
        key = storage_key(t)
        mask = t.dim() == 4 and t.shape[1] == 1 and tuple(t.shape[2:]) == (self.length, self.length)
        if key not in self.own and not mask:  # transformers builds a causal mask only where it sees no values
            self._note(t)
            self.inside.setdefault(self.block, set()).add(key)
        return t

    def _note(self, t: Tensor) -> None:
        key = storage_key(t)
        if key not in self.bytes:
            self.bytes[key] = t.untyped_storage().nbytes()
            self.kept.append(t)

    def _enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.block = index
        x = args[0] if args else kwargs.get("hidden_states")
        if isinstance(x, Tensor):
            self._note(x)
            self.inputs.add(storage_key(x))

    def _leave(self) -> None:
        self.block = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note every tensor that is saved inside."""
        handles = []
        for i, (_, _, block) in enumerate(self.blocks):
            enter = block.register_forward_pre_hook(
                lambda m, args, kwargs, i=i: self._enter(i, args, kwargs), with_kwargs=True
            )
            # an adapter's hook on the block itself, registered before, still counts as inside
            handles += [enter, block.register_forward_hook(lambda *_: self._leave())]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def total(self) -> int:
        return self._sum(set().union(*self.inside.values()))

    def checkpointed(self) -> int:
        """Inputs of all blocks, and the largest of what the blocks and the rest keep while their backward passes
        run."""
        return self._sum(self.inputs) + max((self._sum(s - self.inputs) for s in self.inside.values()), default=0)

    def _sum(self, which: set[int]) -> int:
        return sum(self.bytes[k] for k in which)
