"""Which rows of a batch see which adapter: gather the rows of one adapter, call its page, put them back."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from ...core.errors import SelectionError
from ..model.call import Extent, Names, RowGroup, Rows, Stack
from ..model.site import Site
from ..model.state import ModelState


def row_groups(
    state: ModelState, path: str, names: Container[str], rows: Rows, extent: Extent | None, x: Tensor
) -> list[RowGroup]:
    """The rows of each of these adapters on the layer at `path`, in the order in which the batch names them; extent is
    the batch of the running call of the model, None where a part of it is called alone.

    Raises:
        SelectionError: it cannot be told which rows of the batch the layer's are.
    """
    adapters, each = _owners(path, rows, extent, x)
    all_groups = _groups(state, adapters, each, x.device)
    return [group for name, group in all_groups.items() if name in names]


def site_groups(site: Site, rows: Rows, extent: Extent | None, x: Tensor) -> list[RowGroup]:
    """The same for the adapters of a site; kept for all calls of like size in one `ll.rows` block.

    Raises:
        SelectionError: as `row_groups`.
    """
    if torch.compiler.is_compiling():
        return row_groups(site.state, site.path, site.slots, rows, extent, x)
    key = ("groups", x.shape[0], x.dim(), x.device, extent)
    kept: Stack | None = site.stacks.get(key)
    if kept is not None and kept.epoch == site.state.row_epoch:
        return kept.parts[0]  # type: ignore[return-value]
    groups = row_groups(site.state, site.path, site.slots, rows, extent, x)
    site.keep(key, Stack(site.state.row_epoch, [], 0, (groups,)))
    return groups


def _owners(path: str, rows: Rows, extent: Extent | None, x: Tensor) -> tuple[Names, int]:
    """(adapters, k): the layer's dim 0 holds k elements for each of these, in their order.

    A batch k times as long as the names repeats each row k times (beam search); a 2-D x with batch · tokens elements is
    the flattened (batch, tokens, d) that some models use. Anything else is somebody else's batch: images, windows, time
    first.
    """
    n, names = x.shape[0], rows.names
    for where, owners in rows.at:
        if where == path:
            _check(len(owners) == n, path, rows, extent, x, f"`owners` names {len(owners)} for it")
            return owners, 1
    batch = len(names) if extent is None else extent.batch
    if extent is not None:
        _check_batch(path, rows, extent, x)
    if n == batch:
        _check(len(rows.inner) != n, path, rows, extent, x, "`owners` has as many entries as the batch itself")
        return names, n // len(names)
    if len(rows.inner) == n:
        return rows.inner, 1
    if extent is not None and extent.tokens is not None and x.dim() == 2:
        if n == batch * extent.tokens and n not in extent.others:
            return names, n // len(names)
    _check(all(name == names[0] for name in names), path, rows, extent, x, "which is not the model's own")
    return names[:1], n


def _check_batch(path: str, rows: Rows, extent: Extent, x: Tensor) -> None:
    """Raise where the model's own batch is not that of the names."""
    k, batch = len(rows.names), extent.batch
    _check(batch % k == 0, path, rows, extent, x, "which they do not divide")
    if batch != k > 1 and not extent.named:  # beams, or something else that divides
        _check(extent.tokens != k, path, rows, extent, x, "whose second dimension they fit: time first")
        _check(not extent.others, path, rows, extent, x, f"beside inputs of {', '.join(map(str, extent.others))}")


def _check(right: bool, path: str, rows: Rows, extent: Extent | None, x: Tensor, why: str) -> None:
    if right:
        return
    batch = "" if extent is None else f" in a call with a batch of {extent.batch}"
    raise SelectionError(
        f"{path}: ll.rows names {len(rows.names)} rows, but the layer got an input of shape {tuple(x.shape)}{batch}, "
        f"{why}. Give one name per batch row of the whole model's call; batch-first layers only. Where a layer sees "
        "another batch (images, windows), say which row each of its elements belongs to: "
        f"ll.rows(model, names, owners={{{path!r}: [0, 0, 1]}})."
    )


def _groups(state: ModelState, rows: Names, each: int, device: torch.device) -> dict[str, RowGroup]:
    """Name -> its rows, where every entry of `rows` stands for `each` rows; the same for all layers, so it is kept."""
    if torch.compiler.is_compiling():
        return _build(rows, each, device)
    key = (rows, each, device)
    found = state.row_cache.get(key)
    if found is None:  # another thread may empty the cache at any moment
        if len(state.row_cache) > 8:
            state.row_cache.clear()
        with torch.inference_mode(False):  # an inference tensor could not serve a later training call
            found = state.row_cache[key] = _build(rows, each, device)
    return found


def _build(rows: Names, each: int, device: torch.device) -> dict[str, RowGroup]:
    groups = {}
    for name in dict.fromkeys(rows):
        if name is not None:
            member = torch.tensor([row == name for row in rows for _ in range(each)], device=device)
            index = torch.tensor(
                [i * each + k for i, row in enumerate(rows) if row == name for k in range(each)], device=device
            )
            groups[name] = RowGroup(name, index, member)
    return groups
