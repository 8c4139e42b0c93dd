"""`Layer`: the target as a method's page sees it, the first argument of nearly everything that a page writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from torch import Generator, Tensor

from .config import AdapterConfig

Config = TypeVar("Config", bound=AdapterConfig, covariant=True)
T = TypeVar("T")


class Span(Protocol):
    """Some token positions of a hidden state (B, T, d), as `Layer.spans` finds them."""

    def take(self, h: Tensor) -> Tensor:
        """(B, k, d): h at the span's k positions per row; h itself where the span is every position."""
        ...

    def add(self, h: Tensor, change: Tensor) -> Tensor:
        """h + change at the span's positions and nowhere else; change (B, k, d) belongs to `take(h)`, or broadcasts
        against it."""
        ...


class Layer(Protocol[Config]):
    """One adapter's view of the layer on which it stands; `Layer[LoRAConfig]` says which config `layer.cfg` is.

    d_in and d_out are `in_features` and `out_features`. At a block site both are the width of the residual stream, and
    there is no weight.
    """

    def __getattr__(self, name: str, /) -> Tensor:
        """`layer.lora_A`: this adapter's tensor of that name, whatever the adapter is called. In `forward` it comes in
        y's dtype; in `init`, `penalty` and `on_step` as it is stored."""
        ...

    def __setattr__(self, name: str, value: Tensor, /) -> None:
        """`layer.lora_A = t`, in `init`, `group_init` and `from_factors`: copy t into the declared tensor, whose shape
        it must have."""
        ...

    @property
    def cfg(self) -> Config:
        """The config as this layer sees it, with its own rank and alpha where a pattern sets them."""
        ...

    @property
    def path(self) -> str:
        """Full path of the layer in the model, for messages."""
        ...

    @property
    def in_features(self) -> int:
        """d_in, the width of x."""
        ...

    @property
    def out_features(self) -> int:
        """d_out, the width of y."""
        ...

    @property
    def training(self) -> bool:
        """Whether the layer trains (`model.train()`); False while merging and in `penalty` and `on_step`."""
        ...

    @property
    def strength(self) -> float:
        """The adapter's weight in `ll.activate`, for a page that declares `own_weight`; 1 otherwise."""
        ...

    @property
    def peers(self) -> int:
        """Number of layers that the adapter stands on, this one included; known in `penalty` and `on_step`, 1
        elsewhere."""
        ...

    @property
    def by_number(self) -> bool:
        """Whether x picks columns of the weight by number, as an embedding's does: x @ M is some rows of M."""
        ...

    @property
    def weight(self) -> Tensor:
        """Dense (d_out, d_in) base weight, detached, whatever the layer stores.

        Raises:
            WeightError: it is quantised and the config does not say `dequantize=True`, or it is offloaded or sharded.
        """
        ...

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias (d_out,), or None."""
        ...

    def base(self, v: Tensor) -> Tensor:
        """The bare layer, bias included: v (..., d_in) -> (..., d_out)."""
        ...

    def project(self, v: Tensor) -> Tensor:
        """W v without the bias for a few rows v (n, d_in) -> (n, d_out); gradients flow to v. No dense weight is built,
        so a quantised layer will do."""
        ...

    def row_norms(self) -> Tensor:
        """Euclidean norms of the weight's rows (d_out,), in fp32 or better; a quantised layer will do."""
        ...

    def column_norms(self) -> Tensor:
        """Euclidean norms of the weight's columns (d_in,), in fp32 or better; a quantised layer will do."""
        ...

    def spans(self, h: Tensor, split: bool = False) -> Sequence[Span]:
        """Where the config's `positions` lie in the hidden state h (B, T, d); no span where this call has none of them.

        `split` gives first and last prompt tokens a span of their own, in this order.
        """
        ...

    def context(self, name: str) -> Tensor:
        """What `with ll.context(model, task_ids=...)` says for each row of x: `layer.context("task_ids")`.

        Raises:
            SelectionError: nobody has said it.
        """
        ...

    def add_penalty(self, value: Tensor) -> None:
        """In a training `forward`: this scalar joins what `ll.penalty` gives after the call, a regulariser that has
        seen the activations (the load of a router). Nothing happens in evaluation and without gradients.

        Raises:
            SelectionError: a reentrant checkpoint runs, in which it would have no gradient, or a compiler traces it.
        """
        ...

    def keys_and_values(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """At the attention: what it makes of hidden states v (n, d_in) without a position: keys and values (n,
        d_out)."""
        ...

    def attend(self, q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """At the attention: softmax(q Kᵀ) V with its heads, over keys and values (n, d_out) of their own; q as
        `forward` gets it."""
        ...

    def dropout(self, x: Tensor) -> Tensor:
        """Dropout with the config's probability while the layer trains; x itself otherwise."""
        ...

    def master(self, name: str) -> Tensor:
        """The tensor called `name` as it is stored: the parameter itself, with its `.grad`."""
        ...

    def tiny(self, name: str) -> Tensor:
        """The tensor called `name` in the page's dtype or fp32, whichever is better: for norms, inverses and other
        small algebra."""
        ...

    def once(self, what: str, compute: Callable[[], T]) -> T:
        """compute(), which must depend on this adapter's tensors, config and strength alone; `what` names the value on
        this page. While a model generates with a key-value cache it is kept from token to token."""
        ...

    def generator(self, name: str = "init") -> Generator:
        """A CPU generator that depends on the config's seed, the layer's path and `name` only."""
        ...


class StagedLayer(Layer[Config], Protocol[Config]):
    """A layer before the adapter is on it: what `group_init` finds in its targets."""

    def resize(self, **changes: Any) -> None:
        """Replace fields of this layer's config (say `r=4, alpha=8`) and draw its tensors anew."""
        ...
