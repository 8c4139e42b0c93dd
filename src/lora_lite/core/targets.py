"""`Targets` and `StepTargets`: all layers of an adapter, as `group_init` and `on_step` see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from .layer import Config, Layer, StagedLayer


class Moments(Protocol):
    """Sums over the n tokens that one layer saw, per input feature (d_in,), in fp32 or better."""

    @property
    def n(self) -> int:
        """Number of tokens."""
        ...

    @property
    def sum(self) -> Tensor:
        """Σ x."""
        ...

    @property
    def abs(self) -> Tensor:
        """Σ |x|."""
        ...

    @property
    def square(self) -> Tensor:
        """Σ x²."""
        ...


class Gram(Protocol[Config]):
    """Σ xᵀx over n tokens, of the layers that receive one and the same tensor."""

    @property
    def views(self) -> Sequence[StagedLayer[Config]]:
        """The layers."""
        ...

    @property
    def n(self) -> int:
        """Number of tokens."""
        ...

    @property
    def C(self) -> Tensor:
        """Σ xᵀx (d_in, d_in), in fp32 or better."""
        ...

    @property
    def sum(self) -> Tensor:
        """Σ x (d_in,), in fp32 or better."""
        ...

    def times(self, v: Tensor) -> Tensor:
        """C v for v (d_in, b), without C while the tokens are few."""
        ...

    @property
    def trace(self) -> Tensor:
        """Σ ‖x‖²."""
        ...

    def leading(self, k: int, centred: bool = False) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues (k,) of C, descending, and eigenvectors (d_in, k), signs fixed; centred: of C
        without the tokens' mean. Few tokens are decomposed themselves, without C."""
        ...


class Targets(Protocol[Config]):
    """The layers of a `group_init`: a list, with statistics of a pass of the data through the untouched model.

    Padding never counts (a batch's `attention_mask`); `labelled` leaves out the tokens whose label is -100, too.
    """

    def __iter__(self) -> Iterator[StagedLayer[Config]]: ...

    def __len__(self) -> int: ...

    def remove(self, view: Any, /) -> None:
        """Leave this layer without an adapter."""
        ...

    def moments(self, data: Any, labelled: bool = False) -> Mapping[str, Moments]:
        """Path -> first and second moments of every input feature."""
        ...

    def gram(self, data: Any, labelled: bool = False) -> Mapping[str, Tensor]:
        """Path -> C = Σ xᵀx (d_in, d_in), all at once."""
        ...

    def each_gram(self, data: Any, labelled: bool = False) -> Iterator[Gram[Config]]:
        """The same, one distinct input after the other, in as many passes as the memory needs."""
        ...

    def gradients(self, data: Any, loss: Callable[[Any], Tensor] | None = None) -> Mapping[str, Tensor]:
        """Path -> ∂loss/∂W (d_out, d_in), averaged over the batches, all at once; `loss` maps the model's output to a
        scalar, by default its `.loss`."""
        ...

    def each_gradient(
        self, data: Any, loss: Callable[[Any], Tensor] | None = None
    ) -> Iterator[tuple[StagedLayer[Config], Tensor]]:
        """The same, one layer after the other, in as many passes as the memory needs."""
        ...

    def each_gradient_svd(
        self,
        data: Any,
        rank: Callable[[StagedLayer[Config]], int],
        loss: Callable[[Any], Tensor] | None = None,
    ) -> Iterator[tuple[StagedLayer[Config], Tensor, Tensor, Tensor]]:
        """(layer, U, S, V): its gradient's rank(layer) largest singular triplets, U (d_out, k), S (k,), V (d_in, k),
        signs fixed. Few tokens are decomposed themselves, without a matrix of the weight's size."""
        ...

    def stream(
        self, data: Any, visit: Callable[[StagedLayer[Config], Tensor, Tensor], None], labelled: bool = False
    ) -> None:
        """Call `visit(view, x, y)` for every batch and layer with x (n, d_in) and y (n, d_out), padding left out."""
        ...

    def stream_whole(
        self,
        data: Any,
        visit: Callable[[StagedLayer[Config], Tensor, Tensor, Tensor | None], None],
        labelled: bool = False,
    ) -> None:
        """Call `visit(view, x, y, mask)` with x and y as the layer has them and the mask (batch, tokens) of the tokens
        that count, or None."""
        ...

    def remembered(self, data: Any, n: int) -> Iterator[tuple[StagedLayer[Config], Tensor, Tensor]]:
        """(layer, keys (n, d_out), values (n, d_out)) of the data's first n tokens, at the attention."""
        ...


class StepTargets(Protocol[Config]):
    """The layers of an `on_step`: a list at storage precision, and the length of the schedule."""

    def __iter__(self) -> Iterator[Layer[Config]]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Layer[Config]: ...

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run, also across save and load."""
        ...
