"""What a kind of layer answers: everything that differs between a linear layer, an embedding, a bank of experts, ..."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..._torch import remove_hooks
from ...core.errors import TargetError, WeightError

if TYPE_CHECKING:
    from ...core.config import AdapterConfig
    from ...core.variant import Variant

Hook = Callable[..., Any]


class Hooks(NamedTuple):
    """The pre-hook and the hook of an adapted module; both take keyword arguments."""

    before: Hook
    after: Hook


class HasModule(Protocol):
    """A place in a model: what `Kind.narrow` looks at."""

    @property
    def path(self) -> str: ...

    @property
    def module(self) -> nn.Module: ...

    @property
    def kind(self) -> str: ...


def not_what_it_seems(module: nn.Module, path: str, why: str) -> str:
    """The sentence of a refusal; `why` is what `Kind.strange` says."""
    return (
        f"{path}: this {type(module).__name__} has a forward of its own and {why}, so an adapter would not act in its "
        "weight. Add it to exclude_names."
    )


P = TypeVar("P", bound=HasModule)
Part = tuple[slice, slice]
"""Rows and columns of a matrix."""


class Cell:
    """One matrix W (d_out, d_in) inside a layer, with its bias b (d_out,) or None: y = W x + b."""

    index: int | None = None
    """Number of the expert it belongs to; None where the layer has one matrix."""
    has_bias = True
    """Whether what the layer gives for a zero has a place of its own, beside W."""

    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """W and b."""
        raise NotImplementedError

    def matrix(self, stored: Tensor) -> Tensor:
        """W out of a copy of the layer's stored weight."""
        raise NotImplementedError

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """b."""
        raise NotImplementedError

    def write(self, part: Part, block: Tensor) -> Tensor:
        """Put a block in the place of a part of the stored W. Returns what stands there now, rounded to the storage
        dtype."""
        raise NotImplementedError

    def write_bias(self, b: Tensor) -> None:
        """Put b in the place of the stored one, or where there was none and b is not zero."""
        raise NotImplementedError

    def units(self, start: int, n: int, w: Tensor, room: Tensor | None = None) -> Any:
        """Up to n rows of the identity (n, d_in) from row `start` on, as an input of the layer: their product with Wᵀ
        is W's columns as rows. w: the shape, dtype and device of W. room: where they may stand."""
        n = min(n, w.shape[1] - start)
        eye = w.new_zeros(n, w.shape[1]) if room is None else room[:n].zero_()
        eye[torch.arange(n), torch.arange(start, start + n)] = 1
        return eye

    def zero(self, w: Tensor) -> Any:
        """One zero, as an input of the layer."""
        return w.new_zeros(1, w.shape[1])


class Kind:
    """One kind of layer. A target remembers the kind's name; outside of `layers/` nothing compares it.

    The defaults are those of a layer that multiplies vectors with one matrix and takes them as a page wants them.
    """

    name: str
    # ---- facts
    apart = False
    """It is no layer with a weight, but a place where a method stands by its `site`, whatever its config chooses."""
    stream = False
    """It is the residual stream after a block."""
    named = False
    """Any module that its config names may be one."""
    attends = False
    """Adapters act where queries, keys and values become scores, not on the module's input and output."""
    swaps_weight = False
    """Its adapted weights stand in for the stored ones while it runs: no page sees its input."""
    plain_vectors = False
    """x and y are ordinary tensors of vectors, so a pair of factors means the same everywhere."""
    groups_rows = False
    """Several adapters of one batch may act on it with one call."""
    takes_weight = False
    """While it runs, another weight may stand before the stored one."""
    by_number = False
    """It picks rows of its weight by number, so a layer that multiplies with the same weight is tied to it."""
    inside_blocks = False
    """By default only those in the blocks are adapted, where the model has blocks."""
    replaceable = False
    """A dense layer can take the place of one whose weight is packed."""
    offered = True
    """A plan names those that stay unadapted, with how to add them."""

    absent = "the model has none."
    """What to say of a model in which a method that needs this kind finds none."""

    # ---- where it stands
    def size(self, module: nn.Module) -> tuple[int, int] | None:
        """(d_in, d_out) of a module of this kind; None for any other."""
        raise NotImplementedError

    def find(self, model: nn.Module, d_model: int | None) -> Iterator[tuple[str, nn.Module]]:
        """(path, module) of everything of this kind in a model whose residual stream is `d_model` wide."""
        return ((path, m) for path, m in model.named_modules() if self.size(m) is not None)

    def copies(self, module: nn.Module) -> int:
        """How many matrices its adapter's tensors are stacked for; 0 for one matrix that is not stacked."""
        return 0

    def refuse(self, module: nn.Module, path: str, variant: type[Variant], cfg: AdapterConfig) -> str:
        """Why the method cannot stand on this layer and what to do instead; empty where it can."""
        return ""

    def narrow(self, model: nn.Module, places: list[P]) -> list[P]:
        """The places that a method of this kind means when the config names none."""
        return places

    def strange(self, module: nn.Module) -> str:
        """What the layer does otherwise than its kind, found by trying it; empty where it is what it seems, or where it
        has no values to be tried with."""
        return ""

    def untried(self, module: nn.Module) -> bool:
        """Whether `strange` could not try it, because it has no values yet."""
        return False

    def notes(self, modules: Sequence[nn.Module], variant: Any) -> list[str]:
        """What one should know before such layers are adapted."""
        names = sorted({type(m).__name__ for m in modules if self.untried(m)})
        if not names:
            return []
        return [f"{', '.join(names)}: a forward of its own, without values to try it on; the first call tries it"]

    # ---- before the first step
    def inspect(self, module: nn.Module, path: str) -> object:
        """What must be known of a layer while its adapters run.

        Raises:
            TargetError: it is not what it seems.
        """
        if why := self.strange(module):
            raise TargetError(not_what_it_seems(module, path, why))
        return None

    def trial(self, module: nn.Module, dtype: torch.dtype, d_out: int) -> tuple[Any, Tensor] | None:
        """A tiny (x, y) to try a page on; None where any page will do."""
        return None

    def hooked(self, module: nn.Module) -> nn.Module:
        """The module that carries the hooks."""
        return module

    def join(self, module: nn.Module, path: str, hooks: Hooks) -> None:
        """Put the hooks on."""
        module.register_forward_pre_hook(hooks.before, with_kwargs=True)
        module.register_forward_hook(hooks.after, with_kwargs=True, always_call=self.takes_weight)

    def part(self, module: nn.Module, path: str, hooks: Hooks) -> None:
        """Take the hooks off."""
        remove_hooks(module, {"_forward_pre_hooks": hooks.before, "_forward_hooks": hooks.after})

    # ---- while the model runs
    def enter(self, module: nn.Module, x: Tensor, y: Tensor) -> tuple[Any, Tensor]:
        """(x, y) of a call as a page wants them."""
        return x, y

    def leave(self, module: nn.Module, new: Tensor, y: Tensor) -> Tensor:
        """What the layer returns, from a page's new y; `y` is what the layer returned by itself."""
        return new

    def keys_and_values(self, module: nn.Module, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of hidden states v, at the attention."""
        raise NotImplementedError

    def attend(self, module: nn.Module, q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """Attention of its queries to other keys and values, at the attention."""
        raise NotImplementedError

    # ---- the matrices inside
    def is_plain(self, module: nn.Module) -> bool:
        """Whether its weight is an ordinary tensor that the layer multiplies with."""
        return False

    def writable(self, module: nn.Module) -> bool:
        """Whether merging can write into its weight."""
        return self.is_plain(module)

    def is_quantised(self, module: nn.Module) -> bool:
        """Whether its weight is packed: no ordinary floating tensor of the right size."""
        return False

    def why_not_replaced(self, module: nn.Module) -> str:
        """Why no dense layer can take its place; empty where one can."""
        return "" if self.replaceable else "has a forward of its own and cannot be merged"

    def replacement(self, module: nn.Module, w: Tensor, b: Tensor) -> nn.Module:
        """A dense layer with this W and b, where `replaceable`."""
        raise NotImplementedError

    def stored(self, module: nn.Module) -> Tensor:
        """The weight as the layer stores it."""
        w = module._parameters.get("weight")
        w = module.weight if w is None else w
        assert isinstance(w, Tensor)
        return w

    def bias(self, module: nn.Module) -> Tensor | None:
        """b of y = W x + b, or None."""
        b = getattr(module, "bias", None)
        return b if isinstance(b, Tensor) else None

    def as_matrix(self, module: nn.Module, stored: Tensor) -> Tensor:
        """A tensor of the stored weight's layout seen as (d_out, d_in), without a copy."""
        return stored

    def as_stored(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """The inverse of `as_matrix`."""
        return matrix

    def cells(self, module: nn.Module, path: str) -> list[Cell]:
        """The matrices inside, in order."""
        return []

    def read(self, module: nn.Module, path: str, dtype: torch.dtype | None = None) -> Tensor:
        """W (d_out, d_in), without a copy where it is stored so and no other dtype is asked for.

        Raises:
            WeightError: the layer does more than multiply with its weight.
        """
        if not self.is_plain(module):
            raise WeightError(
                f"{path}: a {type(module).__name__} with a forward of its own cannot be read as one matrix."
            )
        dense = self.as_matrix(module, self.stored(module)).detach()
        return dense if dtype is None else dense.to(dtype)

    def sample(self, module: nn.Module, rows: Tensor, columns: Tensor) -> Tensor | None:
        """W at these rows (n, 1) and columns (m,), for a fingerprint; None where there is nothing to look at."""
        return self.as_matrix(module, self.stored(module)).detach()[rows, columns]
