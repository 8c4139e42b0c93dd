"""Embeddings: a product with one-hot rows that are never built."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import TargetError, listing
from ..model.kind import Cell, Kind, P
from ..model.site import Site
from ..model.state import SITE
from .cell import MatrixCell
from .tensors import is_ordinary, is_packed, stored_weight
from .tried import can_be_tried, has_own_forward, scale_of_lookup
from .virtual import VirtualInput, refuse_input


class Lookup(VirtualInput):
    """One-hot rows (…, V) for the token ids (…): x @ M picks rows of M."""

    def __init__(self, ids: Tensor, size: int, dtype: torch.dtype) -> None:
        super().__init__((*ids.shape, size), dtype, ids.device)
        self.ids = ids

    def __matmul__(self, other: Tensor) -> Tensor:
        return F.embedding(self.ids, other)

    def index_select(self, dim: int, index: Tensor) -> Any:
        if dim == -1:  # few columns of the one-hot rows are small enough to be built
            return (self.ids[..., None] == index).to(self.dtype)
        return Lookup(self.ids.index_select(dim, index), self.shape[-1], self.dtype)

    def dropout(self, p: float) -> Lookup:
        raise TargetError(
            "dropout on the one-hot input of an embedding has no meaning; set dropout=0 or exclude the embedding."
        )


def _tried(module: nn.Module) -> tuple[float | None, str]:
    """What multiplies the rows that it looks up, or None and what it does instead."""
    if not has_own_forward(module, {nn.Embedding.forward}) or not can_be_tried(module):
        return 1.0, ""
    return scale_of_lookup(module, cast(nn.Embedding, module).num_embeddings)


def scale_of(module: nn.Module) -> float:
    """What an adapted embedding multiplies its rows by: found at attach, or now where it had no values then."""
    site: Site = module.__dict__[SITE]
    if not isinstance(site.found, float):
        site.found = site.kind.inspect(module, site.path)
    return cast(float, site.found)


class EmbeddingCell(MatrixCell):
    """W (d, V) of an embedding that stores Wᵀ. Every lookup has one id, so what a page adds to all stands in W."""

    has_bias = False

    def write_bias(self, b: Tensor) -> None:
        pass  # an embedding has none

    def units(self, start: int, n: int, w: Tensor, room: Tensor | None = None) -> Any:
        size = w.shape[1]  # the rows of a large vocabulary are looked up, never built
        return Lookup(torch.arange(start, min(start + n, size), device=w.device), size, w.dtype)


class Embedding(Kind):
    """`nn.Embedding` (V, d): d_in = V, d_out = d."""

    name = "embedding"
    by_number = True

    def size(self, module: nn.Module) -> tuple[int, int] | None:
        return (module.num_embeddings, module.embedding_dim) if isinstance(module, nn.Embedding) else None

    def refuse(self, module: nn.Module, path: str, variant: Any, cfg: Any) -> str:
        embedding = cast(nn.Embedding, module)
        if embedding.max_norm is not None or embedding.sparse:
            return "an embedding with max_norm or sparse gradients cannot be adapted; add it to exclude_names."
        if not (why := refuse_input(self.name, variant)) and cfg.dropout:
            return "dropout on the one-hot input of an embedding has no meaning; set dropout=0 or exclude it."
        return why

    def narrow(self, model: nn.Module, places: list[P]) -> list[P]:
        """Without embeddings other than the input embedding (those of positions, say).

        Raises:
            TargetError: the model does not say which of several it is.
        """
        several = [s for s in places if s.kind == self.name]
        if len(several) < 2:
            return places
        get = getattr(model, "get_input_embeddings", None)
        try:
            module = get() if callable(get) else None
        except (NotImplementedError, AttributeError):
            module = None
        if not any(s.module is module for s in several):
            raise TargetError(
                f"the model has {len(several)} embeddings ({listing([s.path for s in several])}) and does not say "
                "which one holds the tokens; name it in target_names."
            )
        return [s for s in places if s.kind != self.name or s.module is module]

    def trial(self, module: nn.Module, dtype: torch.dtype, d_out: int) -> tuple[Any, Tensor]:
        w = stored_weight(module)
        ids = torch.zeros(2, 3, dtype=torch.long, device=w.device)
        return Lookup(ids, w.shape[0], dtype), torch.zeros(2, 3, d_out, dtype=dtype, device=w.device)

    def enter(self, module: nn.Module, x: Tensor, y: Tensor) -> tuple[Any, Tensor]:
        """y without the number by which some models multiply their embeddings: a page changes the weight's rows."""
        c = scale_of(module)
        return Lookup(x, cast(nn.Embedding, module).num_embeddings, y.dtype), y if c == 1 else y / c

    def leave(self, module: nn.Module, new: Tensor, y: Tensor) -> Tensor:
        c = scale_of(module)
        return new if c == 1 else y + c * (new - y / c)

    def untried(self, module: nn.Module) -> bool:
        return has_own_forward(module, {nn.Embedding.forward}) and not can_be_tried(module)

    def strange(self, module: nn.Module) -> str:
        return _tried(module)[1]

    def inspect(self, module: nn.Module, path: str) -> float:
        super().inspect(module, path)
        return _tried(module)[0] or 1.0

    def is_plain(self, module: nn.Module) -> bool:
        plain = SITE in module.__dict__ or not self.strange(module)  # what is adapted was tried before
        return plain and is_ordinary(module._parameters.get("weight"))

    def is_quantised(self, module: nn.Module) -> bool:
        embedding = cast(nn.Embedding, module)
        return is_packed(module.weight, embedding.num_embeddings * embedding.embedding_dim)

    def as_matrix(self, module: nn.Module, stored: Tensor) -> Tensor:
        return stored.mT

    def as_stored(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.mT

    def cells(self, module: nn.Module, path: str) -> list[Cell]:
        return [EmbeddingCell(self, module, path)]
