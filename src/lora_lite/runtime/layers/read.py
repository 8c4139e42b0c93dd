"""What a layer does, as a dense matrix. A plain dense weight is taken as it is; any other is read off what the layer
does to the identity."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import WeightError
from .bank import Bank
from .kinds import (
    FLOATS,
    bias_of,
    dense_view,
    device_of,
    dims,
    extent,
    is_plain,
    is_quantised,
    is_sharded,
    stored_weight,
)

COLUMNS = 512  # of the identity, pushed through a layer at a time


@contextmanager
def without_bias(module: nn.Module) -> Iterator[None]:
    """Set the bias aside, so that probing a 16-bit layer does not round the weight to the bias's step."""
    b = bias_of(module)
    if b is None:
        yield
        return
    owner: dict[str, Any] = (
        module._parameters  # pyright: ignore[reportAssignmentType]
        if "bias" in module._parameters
        else module._buffers
        if "bias" in module._buffers
        else module.__dict__
    )
    owner["bias"] = None
    try:
        yield
    finally:
        owner["bias"] = b


def probe_dtype(module: nn.Module) -> torch.dtype:
    """The dtype in which a non-plain layer takes its input."""
    for t in (bias_of(module), getattr(module, "weight", None), getattr(module, "scales", None)):
        if isinstance(t, Tensor) and t.dtype in FLOATS:
            return t.dtype
    dtype = getattr(module, "compute_dtype", None)
    return dtype if dtype in FLOATS else torch.float32


@torch.no_grad()
def apply_linear(module: nn.Module, v: Tensor) -> Tensor:
    """v Wᵀ through the bare layer, bias set aside. v: (n, d_in) -> (n, d_out) in v's dtype."""
    probe = v.to(probe_dtype(module), copy=True).requires_grad_()
    with without_bias(module):  # bitsandbytes repacks its weight for inference when a CPU input needs no gradient
        return run_bare(module, probe).to(v.dtype)


def run_bare(module: nn.Module, v: Tensor) -> Tensor:
    """The layer without hooks; the first entry of a tuple."""
    out = module.forward(v)
    out = out[0] if isinstance(out, tuple) else out
    if not isinstance(out, Tensor):
        raise WeightError(
            f"{type(module).__name__} returns {type(out).__name__}, neither a tensor nor a tuple that begins with "
            "one, so it cannot be adapted. Add it to exclude_names."
        )
    return out


@torch.no_grad()
def read_weight(module: nn.Module, path: str, dtype: torch.dtype | None = None) -> Tensor:
    """The dense (d_out, d_in) weight. Plain: the stored tensor (Conv1D: its transposed view), cast when `dtype` is
    given. Otherwise the layer is applied to the identity, `COLUMNS` columns at a time, in fp32 or better.

    Raises:
        WeightError: the weight is on the meta device or sharded.
    """
    w = getattr(module, "weight", None)
    if isinstance(w, Tensor) and w.is_meta:
        raise WeightError(
            f"{path}: the weight is on the meta device (offloaded by accelerate, or not loaded yet), so it cannot be "
            "read. Load the model without offloading, e.g. from_pretrained(..., device_map=None), attach, then "
            "dispatch it."
        )
    if is_sharded(w if isinstance(w, Tensor) else None):
        raise WeightError(f"{path}: the weight is sharded. Attach before fully_shard / deepspeed.initialize.")
    if is_plain(module):
        dense = dense_view(module).detach()
        return dense if dtype is None else dense.to(dtype)
    kind, d_in, d_out = extent(module)  # type: ignore[misc]
    if kind != "linear":
        raise WeightError(f"{path}: a {type(module).__name__} with a forward of its own cannot be read as one matrix.")
    dtype = dtype or torch.float32
    out = torch.empty(d_out, d_in, dtype=dtype, device=device_of(module))
    for start, columns in _column_blocks(module, d_in, dtype):
        out[:, start : start + columns.shape[0]] = columns.mT.to(dtype)
    return out


def _column_blocks(module: nn.Module, d_in: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first column, up to `COLUMNS` columns of the weight as rows (n, d_out)), read off the layer, in `dtype` or fp32
    if that is better."""
    for start in range(0, d_in, COLUMNS):
        n = min(COLUMNS, d_in - start)
        eye = torch.zeros(n, d_in, dtype=torch.promote_types(dtype, torch.float32), device=device_of(module))
        eye[torch.arange(n), torch.arange(start, start + n)] = 1
        yield start, apply_linear(module, eye)


@torch.no_grad()
def weight_norms(module: nn.Module, path: str, dim: int) -> Tensor:
    """Norms of the weight's rows (dim 1, one per output) or columns (dim 0, one per input), in fp32 or better; a packed
    weight is streamed."""
    w = getattr(module, "weight", None)
    if is_plain(module) or not isinstance(w, Tensor) or w.is_meta or is_sharded(w) or dims(module) is None:
        dense = read_weight(module, path)
        return torch.linalg.vector_norm(dense, dim=dim, dtype=torch.promote_types(torch.float32, dense.dtype))
    blocks = (columns for _, columns in _column_blocks(module, dims(module)[0], torch.float32))  # type: ignore[index]
    if dim == 0:
        return torch.cat([torch.linalg.vector_norm(columns, dim=1) for columns in blocks])
    return torch.stack([torch.linalg.vector_norm(columns, dim=0) for columns in blocks]).norm(dim=0)


@torch.no_grad()
def fingerprint(module: nn.Module) -> dict[str, object]:
    """A cheap signature of a base weight: 4 columns x 16 rows of it, its storage dtype, and whether it is quantised."""
    kind, d_in, d_out = extent(module)  # type: ignore[misc]
    cols = [((2 * k + 1) * d_in) // 8 for k in range(4)]
    rows = [((2 * k + 1) * d_out) // 32 for k in range(16)]
    w = getattr(module, "weight", None)
    if isinstance(w, Tensor) and (w.is_meta or is_sharded(w)):
        return {}
    if isinstance(module, Bank):
        which = [(k * module.n_experts) // 16 for k in range(16)]
        sample = module.dense().detach()[which, rows][:, cols]
    elif is_plain(module) or kind != "linear":
        sample = (dense_view(module) if kind != "norm" else stored_weight(module)[:, None]).detach()[rows][:, cols]
    else:
        eye = torch.zeros(4, d_in, device=device_of(module))
        eye[range(4), cols] = 1
        sample = apply_linear(module, eye)[:, rows].mT
    w_dtype = w.dtype if isinstance(w, Tensor) and w.dtype in FLOATS else torch.float32
    return {
        "sample": [float(f"{v:.6g}") for v in sample.float().flatten().tolist()],
        "dtype": str(w_dtype).removeprefix("torch."),
        "quantised": is_quantised(module),
    }
