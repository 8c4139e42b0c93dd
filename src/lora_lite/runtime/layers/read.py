"""What a layer does, as a dense matrix, whatever its kind and however it stores its weight."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..._torch import is_fake
from ..model.kind import Kind
from .kinds import DEFAULT_KIND, kind_named, kind_of
from .linear import column_blocks, dims
from .tensors import FLOATS, check_readable, exact_dtype, is_sharded


def known_kind(module: nn.Module) -> Kind:
    """Its kind; that of linear layers where none knows it."""
    return kind_of(module) or kind_named(DEFAULT_KIND)


def is_plain(module: nn.Module) -> bool:
    """Whether `weight` is an ordinary dense tensor that the layer multiplies with. Decided by the tensor, not the
    class: torchao keeps `nn.Linear`."""
    return known_kind(module).is_plain(module)


def is_quantised(module: nn.Module) -> bool:
    """Its weight is packed: no ordinary floating tensor of the right size."""
    kind = kind_of(module)
    return kind is None or kind.is_quantised(module)


def dense_view(module: nn.Module) -> Tensor:
    """A plain layer's stored weight seen as (d_out, d_in), or (E, d_out, d_in), without a copy."""
    kind = known_kind(module)
    return kind.as_matrix(module, kind.stored(module))


def read_weight(module: nn.Module, path: str, dtype: torch.dtype | None = None) -> Tensor:
    """The dense (d_out, d_in) weight of a layer, without a copy where it is stored so and no other dtype is asked for.

    Raises:
        WeightError: it is on the meta device or sharded, or the layer does more than multiply with it.
    """
    check_readable(getattr(module, "weight", None), path)
    return known_kind(module).read(module, path, dtype)


@torch.no_grad()
def weight_norms(module: nn.Module, path: str, dim: int) -> Tensor:
    """Norms of the weight's rows (dim 1, one per output) or columns (dim 0, one per input), in fp32 or better; a packed
    weight is streamed."""
    w, size = getattr(module, "weight", None), dims(module)
    if size is None or is_plain(module) or not isinstance(w, Tensor) or w.is_meta or is_sharded(w):
        dense = read_weight(module, path)
        dtype = torch.promote_types(torch.float32, dense.dtype)
        norms = torch.linalg.vector_norm(dense, dim=dim, dtype=dtype)
        if norms.is_meta or is_fake(norms) or torch.compiler.is_compiling() or bool(norms.isfinite().all()):
            return norms
        # squares of numbers above 1e19 leave fp32
        return torch.linalg.vector_norm(dense, dim=dim, dtype=exact_dtype(dense.device)).to(dtype)
    blocks = (columns for _, columns in column_blocks(module, size[0], torch.float32))
    if dim == 0:
        return torch.cat([torch.linalg.vector_norm(columns, dim=1) for columns in blocks])
    return torch.stack([torch.linalg.vector_norm(columns, dim=0) for columns in blocks]).norm(dim=0)


@lru_cache(maxsize=512)
def _rounded(numbers: tuple[float, ...]) -> list[float]:
    """With six digits; many adapters of a layer have one list."""
    return [float(f"{v:.6g}") for v in numbers]


@lru_cache(maxsize=512)
def _spread(size: int, n: int) -> Tensor:
    """n indices in the middle of n equal parts."""
    return torch.tensor([((2 * k + 1) * size) // (2 * n) for k in range(n)])


@torch.no_grad()
def fingerprint(module: nn.Module) -> dict[str, Any]:
    """A cheap signature of a layer's weight: `sample` (4 columns x 16 rows of it), its storage `dtype`, and whether it
    is `quantised`. Empty where there is no weight to look at."""
    kind, w = kind_of(module), getattr(module, "weight", None)
    if kind is None or (isinstance(w, Tensor) and (w.is_meta or is_sharded(w))):
        return {}
    d_in, d_out = kind.size(module) or (0, 0)
    sample = kind.sample(module, _spread(d_out, 16)[:, None], _spread(d_in, 4))
    if sample is None:
        return {}
    dtype = w.dtype if isinstance(w, Tensor) and w.dtype in FLOATS else torch.float32
    return {
        "sample": _rounded(tuple(sample.float().flatten().tolist())),
        "dtype": str(dtype).removeprefix("torch."),
        "quantised": kind.is_quantised(module),
    }
