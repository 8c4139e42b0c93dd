"""W + L R, a stack of matrices that is not formed while it is only indexed, transposed and multiplied with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._torch import with_tensors, without_overrides

STRIDE = 16
"""Bytes to which grouped products want their matrices' rows aligned."""


class Unformed(Tensor):
    """Stands for W + L R: W (..., p, q), L (..., p, k), R (..., k, q).

    x (W + L R) is computed as x W + (x L) R, in the order and with the kernel that the caller asks of W: plain, batched
    or grouped products. Shape, dtype and device are W's. Whatever else is asked gets the formed matrix.
    """

    plain: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, plain: Tensor, left: Tensor, right: Tensor) -> Unformed:
        """W + L R."""
        made = plain.detach().as_subclass(cls)
        made.plain, made.left, made.right = plain, left, right
        return made

    def formed(self) -> Tensor:
        """W + L R itself."""
        return self.plain + self.left @ self.right

    def each(self, change: Callable[[Tensor], Tensor]) -> Unformed:
        """The same selection of all three."""
        return Unformed.of(change(self.plain), change(self.left), change(self.right))

    def flipped(self) -> Unformed:
        """(W + L R)ᵀ."""
        return Unformed.of(self.plain.mT, self.right.mT, self.left.mT)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named: dict[str, Any] = kwargs or {}
        with without_overrides():
            if func in FACTS:
                return func(*(a.plain if isinstance(a, Unformed) else a for a in args), **named)
            rule = RULES.get(func) or (_grouped if _is_grouped(func) else None)
            result = NotImplemented if rule is None else rule(func, *args, **named)
            if result is not NotImplemented:
                return result
            args, named = with_tensors(lambda t: t.formed() if isinstance(t, Unformed) else t, (args, named))
            return func(*args, **named)


def _indexed(func: Any, t: Any, index: Any) -> Any:
    """t[i] for one index, or one list of them, into the stack."""
    whole = isinstance(index, (int, slice)) or (isinstance(index, Tensor) and index.dtype != torch.bool)
    if not isinstance(t, Unformed) or not whole or t.plain.dim() < 3 or isinstance(index, Unformed):
        return NotImplemented
    return t.each(lambda part: part[index])


def _transposed(func: Any, t: Any, *dims: Any) -> Any:
    n = t.plain.dim()
    last = {d % n for d in dims} == {n - 2, n - 1} if dims else n == 2 or func == Tensor.mT.__get__  # type: ignore[attr-defined]
    return t.flipped() if last else NotImplemented


def _linear(func: Any, x: Any, t: Any, bias: Any = None) -> Any:
    if not isinstance(t, Unformed) or isinstance(x, Unformed) or isinstance(bias, Unformed):
        return NotImplemented
    return F.linear(x, t.plain, bias) + F.linear(F.linear(x, t.right), t.left)


def _product(func: Any, a: Any, b: Any) -> Any:
    if isinstance(b, Unformed):
        return NotImplemented if isinstance(a, Unformed) else func(a, b.plain) + func(func(a, b.left), b.right)
    return func(a.plain, b) + func(a.left, func(a.right, b))


def _grouped(func: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
    """Rows of x in groups, each times its own matrix of the stack."""
    if not isinstance(t, Unformed) or isinstance(x, Unformed) or not isinstance(x, Tensor):
        return NotImplemented
    spare = -t.left.shape[-1] % max(1, STRIDE // t.left.element_size())
    left, right = (F.pad(side, (0, spare)) if spare else side for side in (t.left, t.right.mT))
    thin = func(x, _aligned(left), *args, **kwargs)
    return func(x, t.plain, *args, **kwargs) + func(thin, _aligned(right).mT, *args, **kwargs)


def _aligned(t: Tensor) -> Tensor:
    """t (..., n, k), k aligned, with its rows or its columns at aligned strides."""
    rows, columns = t.stride()[-2:]
    stays = columns == 1 or (rows == 1 and columns * t.element_size() % STRIDE == 0)
    return t if stays and t.data_ptr() % STRIDE == 0 else t.clone(memory_format=torch.contiguous_format)


def _is_grouped(func: Any) -> bool:
    """Grouped products go by several names: torch's own, private before 2.10, and transformers' custom operators."""
    return "grouped_mm" in str(getattr(func, "__name__", func))


READ = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "is_quantized")
ASKED = ("size", "dim", "numel", "stride", "data_ptr", "is_contiguous", "element_size", "is_floating_point", "__len__")
FACTS = {getattr(Tensor, name).__get__ for name in READ} | {getattr(Tensor, name) for name in ASKED}
"""What W answers."""
RULES: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _indexed,
    Tensor.mT.__get__: _transposed,  # type: ignore[attr-defined]
    Tensor.T.__get__: _transposed,  # type: ignore[attr-defined]
    Tensor.transpose: _transposed,
    torch.transpose: _transposed,
    Tensor.t: _transposed,
    F.linear: _linear,
} | dict.fromkeys(
    (torch.bmm, torch.mm, torch.matmul, Tensor.bmm, Tensor.mm, Tensor.matmul, Tensor.__matmul__), _product
)
