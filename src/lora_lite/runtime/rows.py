"""Which rows of a batch see which adapter: gather the rows of one adapter, call its page, put them back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import SelectionError
from .state import Site


def blend(old: Tensor, new: Tensor, weight: float) -> Tensor:
    """old + weight (new - old); weight 1 is `new` itself."""
    return new if weight == 1.0 else old + weight * (new - old)


def row_groups(site: Site, rows: tuple[str | None, ...], x: Tensor) -> list[tuple[str, Tensor]]:
    """(adapter, indices along dim 0 of x) for the adapters on this layer, in attach order.

    A batch k times as long as `rows` repeats each row k times (beam search); a 2-D x with a multiple of the batch is the flattened
    (batch * time, d) that some models use.

    Raises:
        SelectionError: the leading dimension does not fit.
    """
    n = x.shape[0]
    batch = site.state.batch or (n if x.dim() > 2 else len(rows))
    if batch % len(rows) or (n != batch and (x.dim() != 2 or n % batch)):
        raise SelectionError(
            f"{site.path}: ll.rows names {len(rows)} rows, but the layer got an input of shape {tuple(x.shape)}"
            f"{f' in a batch of {batch}' if site.state.batch else ''}. Give one name per batch row; batch-first layers only."
        )
    each = n // len(rows)
    groups = []
    for name in site.slots:
        index = [i * each + k for i, row in enumerate(rows) if row == name for k in range(each)]
        if index:
            groups.append((name, torch.tensor(index, device=x.device)))
    return groups
