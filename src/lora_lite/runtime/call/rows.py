"""Which rows of a batch see which adapter: gather the rows of one adapter, call its page, put them back."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from ...core.errors import SelectionError
from ..model.call import RowGroup
from ..model.state import ModelState


def row_groups(
    state: ModelState, path: str, names: Container[str], rows: tuple[str | None, ...], x: Tensor
) -> list[RowGroup]:
    """The rows of each of these adapters on the layer at `path`, in the order in which the batch names them.

    A batch k times as long as `rows` repeats each row k times (beam search); a 2-D x with a multiple of the batch is
    the flattened (batch * time, d) that some models use.

    Raises:
        SelectionError: the leading dimension does not fit.
    """
    n = x.shape[0]
    batch = state.batch or (n if x.dim() > 2 else len(rows))
    if batch % len(rows) or (n != batch and (x.dim() != 2 or n % batch)):
        raise SelectionError(
            f"{path}: ll.rows names {len(rows)} rows, but the layer got an input of shape "
            f"{tuple(x.shape)}{f' in a batch of {batch}' if state.batch else ''}. Give one name per batch row; "
            "batch-first layers only."
        )
    all_groups = _groups(state, rows, n // len(rows), x.device)
    return [group for name, group in all_groups.items() if name in names]


def _groups(state: ModelState, rows: tuple[str | None, ...], each: int, device: torch.device) -> dict[str, RowGroup]:
    """Name -> its rows, where every entry of `rows` stands for `each` rows; the same for all layers, so it is kept."""
    if torch.compiler.is_compiling():
        return _build(rows, each, device)
    key = (rows, each, device)
    if key not in state.row_cache:
        if len(state.row_cache) > 8:
            state.row_cache.clear()
        with torch.inference_mode(False):  # an inference tensor could not serve a later training call
            state.row_cache[key] = _build(rows, each, device)
    return state.row_cache[key]


def _build(rows: tuple[str | None, ...], each: int, device: torch.device) -> dict[str, RowGroup]:
    groups = {}
    for name in dict.fromkeys(rows):
        if name is not None:
            member = torch.tensor([row == name for row in rows for _ in range(each)], device=device)
            index = torch.tensor(
                [i * each + k for i, row in enumerate(rows) if row == name for k in range(each)], device=device
            )
            groups[name] = RowGroup(name, index, member)
    return groups
