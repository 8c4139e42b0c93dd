"""Linear layers, however they store their weight: plain ones, GPT-2's `Conv1D`, and quantised ones, which are read off
what they do to the identity."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ...core.errors import WeightError
from ..model.kind import Cell, Kind
from ..model.site import Site
from ..model.state import SITE
from .cell import MatrixCell
from .tensors import FLOATS, bias_of, check_readable, device_of, is_ordinary, is_packed, stored_weight
from .tried import can_be_tried, has_own_forward, trying, twin_of, why_not_affine

COLUMNS = 512  # of the identity, pushed through a layer at a time


class Linear(Kind):
    """Anything with `in_features` and `out_features`."""

    name = "linear"
    plain_vectors = True
    groups_rows = True
    inside_blocks = True
    replaceable = True
    takes_weight = True

    def size(self, module: nn.Module) -> tuple[int, int] | None:
        return dims(module)

    def find(self, model: nn.Module, d_model: int | None) -> Iterator[tuple[str, nn.Module]]:
        """Those without a linear-like child: a wrapper that copies `in_features` is not the layer."""
        for path, module in model.named_modules():
            if dims(module) is not None and not any(dims(m) for m in module.modules() if m is not module):
                yield path, module

    def strange(self, module: nn.Module) -> str:
        if not _is_tried(module):
            return ""
        return why_not_affine(module, (dims(module) or (0, 0))[0], probe_dtype(module))

    def untried(self, module: nn.Module) -> bool:
        own = not is_conv1d(module) and has_own_forward(module, {nn.Linear.forward})
        return own and is_ordinary(getattr(module, "weight", None)) and not can_be_tried(module)

    def inspect(self, module: nn.Module, path: str) -> float:
        """What a forward of its own multiplies the stored bias by: 0 where it is handed out beside y."""
        super().inspect(module, path)
        return _share_of_bias(module)

    def bias(self, module: nn.Module) -> Tensor | None:
        b = bias_of(module)
        if b is None or type(module).forward is nn.Linear.forward:
            return b
        site: Site | None = module.__dict__.get(SITE)
        share = _share_of_bias(module) if site is None or site.found is None else cast(float, site.found)
        return b if share == 1 else b * share

    def is_plain(self, module: nn.Module) -> bool:
        w, size = module._parameters.get("weight"), dims(module)
        if not is_ordinary(w) or w is None or size is None:
            return False
        if is_conv1d(module):
            return tuple(w.shape) == size
        return type(module).forward is nn.Linear.forward and tuple(w.shape) == (size[1], size[0])

    def is_quantised(self, module: nn.Module) -> bool:
        d_in, d_out = dims(module) or (0, 0)
        return is_packed(getattr(module, "weight", None), d_in * d_out)

    def why_not_replaced(self, module: nn.Module) -> str:
        return "returns more than one tensor, which no dense layer would" if _returns_more(module) else ""

    def replacement(self, module: nn.Module, w: Tensor, b: Tensor) -> nn.Module:
        has_bias = bias_of(module) is not None or bool(b.any())
        d_out, d_in = w.shape
        dense = nn.Linear(d_in, d_out, bias=has_bias, device="meta", dtype=probe_dtype(module))  # draws nothing
        dense = dense.to_empty(device=w.device).requires_grad_(False).train(module.training)
        dense.weight.copy_(w)
        if has_bias:
            dense.bias.copy_(b)
        return dense

    def as_matrix(self, module: nn.Module, stored: Tensor) -> Tensor:
        return stored.mT if is_conv1d(module) else stored

    def as_stored(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.mT if is_conv1d(module) else matrix

    def read(self, module: nn.Module, path: str, dtype: torch.dtype | None = None) -> Tensor:
        return read_linear(module, path, dtype)

    def cells(self, module: nn.Module, path: str) -> list[Cell]:
        return [LinearCell(self, module, path)]

    def sample(self, module: nn.Module, rows: Tensor, columns: Tensor) -> Tensor:
        if self.is_plain(module):
            return self.as_matrix(module, stored_weight(module)).detach()[rows, columns]
        eye = torch.zeros(len(columns), (dims(module) or (0, 0))[0], device=device_of(module))
        eye[torch.arange(len(columns)), columns] = 1
        return apply_linear(module, eye).mT[rows, torch.arange(len(columns))]


class LinearCell(MatrixCell):
    """W of a linear layer; a packed one is read off what it does."""

    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        return read_linear(self.module, self.path, dtype), self.bias(dtype)


LINEAR = Linear()


def _is_tried(module: nn.Module) -> bool:
    own = not is_conv1d(module) and has_own_forward(module, {nn.Linear.forward})
    return own and can_be_tried(module)


def _zero(module: nn.Module) -> Tensor:
    return torch.zeros(1, (dims(module) or (0, 0))[0], dtype=probe_dtype(module), device=device_of(module))


def _returns_more(module: nn.Module) -> bool:
    if not _is_tried(module):
        return False
    with trying(module) as twin:
        return not isinstance(twin.forward(_zero(module)), Tensor)


@torch.no_grad()
def _share_of_bias(module: nn.Module) -> float:
    """c where the layer maps 0 to c times its stored bias."""
    b = bias_of(module)
    if b is None or not _is_tried(module):
        return 1.0
    with trying(module) as twin:
        y, b = run_bare(twin, _zero(module))[0].double(), b.double()
    share = float((y @ b) / (b @ b).clamp_min(1e-30)) if bool(b.any()) else 1.0
    return next((c for c in (0.0, 1.0) if abs(share - c) < 0.01), share)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer that stores (nx, nf), known by its attributes."""
    return (
        type(module).__name__ == "Conv1D"
        and hasattr(module, "nf")
        and isinstance(getattr(module, "weight", None), Tensor)
    )


def dims(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear-like layer, or None when it is not one."""
    if is_conv1d(module):
        d_in, d_out = stored_weight(module).shape
        return int(d_in), int(d_out)
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        d_in, d_out = getattr(module, names[0], None), getattr(module, names[1], None)
        if isinstance(d_in, int) and isinstance(d_out, int) and not isinstance(module, (nn.Bilinear, nn.Identity)):
            return d_in, d_out
    return None


@torch.no_grad()
def read_linear(module: nn.Module, path: str, dtype: torch.dtype | None = None) -> Tensor:
    """The dense (d_out, d_in) weight. Plain: the stored tensor (Conv1D: its transposed view), cast when `dtype` is
    given. Otherwise the layer is applied to the identity, `COLUMNS` columns at a time, in fp32 or better.

    Raises:
        WeightError: the weight is on the meta device or sharded.
    """
    check_readable(getattr(module, "weight", None), path)
    if LINEAR.is_plain(module):
        dense = LINEAR.as_matrix(module, stored_weight(module)).detach()
        return dense if dtype is None else dense.to(dtype)
    d_in, d_out = dims(module) or (0, 0)
    out = torch.empty(d_out, d_in, dtype=dtype or torch.float32, device=device_of(module))
    for start, columns in column_blocks(module, d_in, out.dtype):
        out[:, start : start + columns.shape[0]] = columns.mT.to(out.dtype)
    return out


def column_blocks(module: nn.Module, d_in: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first column, up to `COLUMNS` columns of the weight as rows (n, d_out)), read off the layer, in `dtype` or fp32
    if that is better."""
    for start in range(0, d_in, COLUMNS):
        n = min(COLUMNS, d_in - start)
        eye = torch.zeros(n, d_in, dtype=torch.promote_types(dtype, torch.float32), device=device_of(module))
        eye[torch.arange(n), torch.arange(start, start + n)] = 1
        yield start, apply_linear(module, eye)


@torch.no_grad()
def apply_linear(module: nn.Module, v: Tensor) -> Tensor:
    """v Wᵀ through the bare layer, bias set aside. v: (n, d_in) -> (n, d_out) in v's dtype."""
    module = twin_of(module) if _is_tried(module) else module  # in evaluation, and no trace is left
    probe = v.to(probe_dtype(module), copy=True).requires_grad_()
    with without_bias(module):  # bitsandbytes repacks its weight for inference when a CPU input needs no gradient
        return run_bare(module, probe).to(v.dtype)


def run_bare(module: nn.Module, v: Tensor) -> Tensor:
    """The layer without hooks; the first entry of a tuple."""
    out = module.forward(v)
    out = out[0] if isinstance(out, tuple) else out
    if not isinstance(out, Tensor):
        raise WeightError(
            f"{type(module).__name__} returns {type(out).__name__}, neither a tensor nor a tuple that begins with one, "
            "so it cannot be adapted. Add it to exclude_names."
        )
    return out


def probe_dtype(module: nn.Module) -> torch.dtype:
    """The dtype in which a layer that is not plain takes its input."""
    for t in (bias_of(module), getattr(module, "weight", None), getattr(module, "scales", None)):
        if isinstance(t, Tensor) and t.dtype in FLOATS:
            return t.dtype
    dtype = getattr(module, "compute_dtype", None)
    return dtype if dtype in FLOATS else torch.float32


@contextmanager
def without_bias(module: nn.Module) -> Iterator[None]:
    """Set the bias to zero, so that probing a 16-bit layer does not round the weight to the bias's step. A forward of
    its own may read it, so it stays a tensor."""
    b = bias_of(module)
    if b is None:
        yield
        return
    tables = (module._parameters, module._buffers, module.__dict__)
    owner: dict[str, object] = next(t for t in tables if "bias" in t)  # pyright: ignore[reportAssignmentType]
    owner["bias"] = torch.zeros_like(b)
    try:
        yield
    finally:
        owner["bias"] = b
