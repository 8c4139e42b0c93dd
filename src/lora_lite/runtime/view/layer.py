"""`LayerView`: the target as one adapter sees it. This is the `layer` of every variant page."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Generator, Tensor, nn

from ..._torch import backward_is_running
from ...core.config import AdapterConfig
from ...core.errors import SelectionError, StateError, WeightError
from ...core.layer import Layer
from ...ops.dropout import dropout
from ..layers.linear import run_bare
from ..layers.read import known_kind, read_weight, weight_norms
from ..layers.sound import check_sound
from ..layers.tensors import device_of, is_sharded
from ..model.call import Call
from ..model.kind import Kind
from ..model.site import Site, Slot, tensor_on
from ..model.state import SITE, ModelState
from .kept import cast_once, memo_of, versions
from .spans import Span, spans

T = TypeVar("T")
PROBE = 256.0
"""How much longer than v the vectors are that `project` pushes through a packed layer with a bias."""


def generator_for(seed: int | None, *names: str) -> Generator:
    """A CPU generator that depends on the seed and the names only: not on device, rank, target order or the global
    state."""
    digest = hashlib.blake2b("\0".join((str(seed), *names)).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class LayerView:
    """The target as one adapter sees it: the `layer` that every page takes.

    `layer.lora_A` is this adapter's tensor, whatever the adapter is called, cast to the dtype in which the page
    computes; `layer.master("lora_A")` is the stored one. In `init`, `layer.lora_A = t` writes it.
    """

    def __init__(
        self,
        module: nn.Module,
        slot: Slot,
        dtype: torch.dtype | None,
        call: Call | None = None,
        rows: Tensor | None = None,
    ) -> None:
        self._module = module
        self._slot = slot
        self._dtype = dtype
        self._call, self._rows = call, rows
        self.cfg: AdapterConfig = slot.cfg
        """The config with this target's rank and alpha."""
        self.still = False
        """Outside of any forward: dropout and other noise of training do not exist for it."""
        self.strength: float = 1.0
        """The adapter's weight in `ll.activate`, for methods that declare `own_weight`."""
        self.peers: int = 1
        """Number of layers that the adapter stands on, where all of them are at hand."""

    def __getattr__(self, name: str) -> Tensor:
        # reached only for names that are not the view's own
        if name == "_lora_cfg":
            raise AttributeError("a layer's config is layer.cfg; layer.cfg.scale is alpha / r")
        if name in ("scale", "alpha", "r"):
            raise AttributeError(f"{name} stands in the config of the layer: layer.cfg.{name}")
        if not name.startswith("lora_"):
            raise AttributeError(
                f"a layer view has no {name!r}; it offers lora_*, weight, row_norms(), column_norms(), bias, cfg, "
                "in_features, out_features, base(v), project(v), spans(h), context(name), dropout(x), master(name), "
                "tiny(name), once(what, compute)"
            )
        tensor = self.master(name)
        dtype = self._dtype
        if dtype is None or tensor.dtype == dtype or not tensor.is_floating_point():
            return tensor
        return cast_once(self._module, tensor, dtype)

    def master(self, name: str) -> Tensor:
        """The stored tensor, uncast: for tiny algebra in full precision."""
        slot = self._slot
        attribute = slot.keys.get(name)
        if attribute is None:
            raise AttributeError(
                f"adapter {slot.name!r} on {slot.path}: param_specs declares no {name!r}; it declares "
                f"{sorted(slot.keys)}"
            )
        module = slot.owners[name] if name in slot.owners else self._module
        tensor = tensor_on(module, attribute)
        if name in slot.owners and tensor is not None:
            tensor = self._brought(name, tensor)
        if tensor is not None and tensor.is_meta and "_hf_hook" in self._module.__dict__:
            raise WeightError(
                f"adapter {slot.name!r} on {slot.path}: accelerate keeps {name} elsewhere and does not bring it for "
                "this layer's call. Merge before offloading (ll.merge), or keep adapted layers on a device."
            )
        if tensor is None:
            raise StateError(
                f"adapter {slot.name!r}: {slot.path}.{attribute} is gone; detach and load the adapter again."
            )
        return tensor

    def _brought(self, name: str, tensor: Tensor) -> Tensor:
        """A shared tensor on this layer's device: a model may be split over several."""
        if is_sharded(tensor):
            raise StateError(
                f"adapter {self._slot.name!r} on {self._slot.path}: {name} is shared with other layers, and the shards "
                "of it are not gathered here. Shard the whole model last, fully_shard(model), and call the model, not "
                "one of its blocks."
            )
        for own in self._module._parameters.values():  # a compiler of torch 2.6 knows no next(iterator, default)
            if own is not None:
                return tensor.to(own.device)
        return tensor.to(device_of(self._module))

    def tiny(self, name: str) -> Tensor:
        """The stored tensor in `promote_types(float32, dtype of the page)`: for Cayley maps, norms and other small
        algebra."""
        tensor = self.master(name)
        return tensor.to(torch.promote_types(torch.float32, self._dtype or tensor.dtype))

    def once(self, what: str, compute: Callable[[], T]) -> T:
        """compute(), which must depend on this adapter's tensors, config and strength alone. While a model generates
        with a key-value cache, the value is kept from token to token; in training it is computed in every call."""
        if torch.compiler.is_compiling():
            return compute()
        memo = memo_of(self._module)
        if memo is None:
            return compute()
        key = (self._slot.path, self._slot.name, what, self._dtype, self.strength)
        state = versions(self._module, self._slot)
        if key not in memo or memo[key][0] != state:
            memo[key] = state, compute()
        return cast(T, memo[key][1])

    @property
    def _kind(self) -> Kind:
        site: Site | None = self._module.__dict__.get(SITE)
        return known_kind(self._module) if site is None else site.kind

    @property
    def path(self) -> str:
        """Full path of the layer in the model."""
        return self._slot.path

    @property
    def training(self) -> bool:
        """Whether the layer trains."""
        return self._module.training and not self.still

    @property
    def by_number(self) -> bool:
        """Whether x picks columns of the weight by number, as an embedding's does."""
        return self._kind.by_number

    @property
    def in_features(self) -> int:
        """d_in, whatever the layer calls it."""
        return self._slot.d_in

    @property
    def out_features(self) -> int:
        """d_out, whatever the layer calls it."""
        return self._slot.d_out

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias in the page's dtype, or None."""
        b = self._kind.bias(self._module)
        return b if b is None or self._dtype is None else b.to(self._dtype)

    @property
    def weight(self) -> Tensor:
        """Dense (d_out, d_in) base weight, detached, whatever the layer stores.

        Raises:
            WeightError: it is quantised and the config does not say `dequantize=True`, or it is offloaded or sharded.
        """
        if not self.cfg.dequantize and self._kind.is_quantised(self._module):
            raise WeightError(
                f"adapter {self._slot.name!r} on {self.path}: variant {self.cfg.variant!r} reads the dense weight, "
                f"and this {type(self._module).__name__} is quantised. Allow it with dequantize=True in the config, "
                "or choose a variant that does not need the weight."
            )
        w = read_weight(self._module, self.path)
        return w if self._dtype is None else w.to(self._dtype)

    def base(self, v: Tensor) -> Tensor:
        """The bare layer, bias included, no hooks: (..., d_in) -> (..., d_out)."""
        return run_bare(self._module, v)

    def project(self, v: Tensor) -> Tensor:
        """W v without the bias, for a few rows v (n, d_in) -> (n, d_out); gradients flow to v. Never builds a dense
        weight."""
        if self._kind.is_plain(self._module):
            w = self._kind.as_matrix(self._module, self._kind.stored(self._module))
            return (v.to(w.dtype) @ w.mT).to(v.dtype)
        return self._project_packed(v.to(self._dtype or v.dtype)).to(v.dtype)

    def _project_packed(self, v: Tensor) -> Tensor:
        if not v.requires_grad and not torch.compiler.is_compiling():
            v = v.detach().requires_grad_()  # bitsandbytes repacks its weight for a CPU input that needs no gradient
        b = self._kind.bias(self._module)
        if b is None:
            return run_bare(self._module, v)
        out = run_bare(self._module, v * PROBE)
        return (out - b.to(out.dtype)) / PROBE  # a large bias must not cost W v its digits

    def spans(self, h: Tensor, split: bool = False) -> list[Span]:
        """Where the config's `positions` lie in the hidden state h (B, T, d): `span.take(h)` and `span.add(h, change)`
        for each.

        No span: none of them is in this call. `split` gives first and last prompt tokens a span of their own, in this
        order.
        """
        text = getattr(self.cfg, "positions", "all")
        return spans(self._call, text, h.shape, self._rows, split, self.path)

    def context(self, name: str) -> Tensor:
        """What `with ll.context(model, name=...)` says, for the rows of x."""
        if self._call is None or name not in self._call.context:
            raise SelectionError(
                f"{self.path}: variant {self.cfg.variant!r} reads {name!r} of each row; say it around the call of the "
                f"whole model: with ll.context(model, {name}=...)."
            )
        value = self._call.context[name]
        return value if self._rows is None else value.index_select(0, self._rows)

    def add_penalty(self, value: Tensor) -> None:
        """In a training forward: this scalar joins what `ll.penalty` gives after the call."""
        site: Site | None = self._module.__dict__.get(SITE)
        if self.training and site is not None:
            _note_penalty(site.state, (self._slot.name, self.path), value)

    def keys_and_values(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """At the attention: what it makes of hidden states v (n, d_in) without a position, keys and values (n,
        d_out)."""
        return self._kind.keys_and_values(self._module, v)

    def attend(self, q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """At the attention: softmax(q Kᵀ) V with its heads, over keys and values (n, d_out) of their own."""
        return self._kind.attend(self._module, q, K, V)

    def row_norms(self) -> Tensor:
        """Norms of the weight's rows (d_out,), in fp32 or better. Never builds a dense weight, so a quantised layer
        will do."""
        return weight_norms(self._module, self.path, 1)

    def column_norms(self) -> Tensor:
        """Norms of the weight's columns (d_in,), in the same way."""
        return weight_norms(self._module, self.path, 0)

    def dropout(self, x: Tensor) -> Tensor:
        """Dropout with the config's probability while the layer trains; x itself otherwise."""
        p = self.cfg.dropout
        if not (p and self.training):
            return x
        return dropout(x, p) if isinstance(x, Tensor) else x.dropout(p)

    def generator(self, name: str = "init") -> Generator:
        """A CPU generator seeded from (seed, this layer's path, name)."""
        return generator_for(self.cfg.seed, self.path, name)


def _note_penalty(state: ModelState, key: tuple[str, str], value: Tensor) -> None:
    """Add to what a page has said in this call."""
    if torch.compiler.is_compiling():
        raise SelectionError(
            f"{key[1]}: adapter {key[0]!r} has a penalty on what its router does, which compiled code cannot hand to "
            "ll.penalty; leave the model uncompiled while it trains, or the penalty out of its config."
        )
    now = state.here.now
    if backward_is_running():
        return
    if not torch.is_grad_enabled():
        if now.grad:
            raise SelectionError(
                f"{key[1]}: adapter {key[0]!r} has a penalty on what its router does, which a checkpoint with "
                "use_reentrant=True cuts off from its gradient; use use_reentrant=False."
            )
        return
    before = now.penalties.get(key)
    now.penalties[key] = value if before is None else before + value


class StagedView(LayerView):
    """The view `init` gets: tensors that are not on the layer yet, at storage precision, assignable."""

    def __init__(
        self, module: nn.Module, slot: Slot, staged: dict[str, Tensor], dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(module, slot, dtype)
        self._staged = staged

    def master(self, name: str) -> Tensor:
        if name not in self._staged:
            raise AttributeError(f"{self.path}: param_specs declares no {name!r}; it declares {sorted(self._staged)}")
        return self._staged[name]

    @property
    def weight(self) -> Tensor:
        return check_sound(super().weight, self.path, self.cfg.variant)

    def __setattr__(self, name: str, value: Any) -> None:
        """`layer.lora_A = t` copies t into the declared tensor; the shape must agree."""
        if not name.startswith("lora_"):
            super().__setattr__(name, value)
            return
        own = self.master(name)
        if tuple(value.shape) != tuple(own.shape):
            raise StateError(
                f"{self.path}.{name}: init wrote shape {tuple(value.shape)}, param_specs declares {tuple(own.shape)}."
            )
        with torch.no_grad():
            own.copy_(value)


class DenseView(LayerView):
    """The view that merging and swapped-in weights use: weight and bias given, all computed in `dtype`, no dropout.

    Of a layer with several matrices it shows one: the adapter's tensors are the slices of that one. A weight that is
    stored in another dtype is cast a few rows at a time.
    """

    def __init__(
        self,
        module: nn.Module,
        slot: Slot,
        weight: Tensor,
        bias: Tensor | None,
        tensors: dict[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(module, slot, dtype or weight.dtype)
        self._weight, self._bias, self._tensors = weight, bias, tensors
        self._memo: dict[str, Any] = {}

    def master(self, name: str) -> Tensor:
        if self._tensors is None:
            return super().master(name)
        if name not in self._tensors:
            raise AttributeError(f"{self.path}: param_specs declares no {name!r}; it declares {sorted(self._tensors)}")
        return self._tensors[name]

    def once(self, what: str, compute: Callable[[], T]) -> T:
        if what not in self._memo:  # the memo of a generation knows a layer, not its experts
            self._memo[what] = compute()
        return self._memo[what]

    @property
    def weight(self) -> Tensor:
        return self._weight.to(self._dtype)

    @property
    def bias(self) -> Tensor | None:
        return self._bias

    def row_norms(self) -> Tensor:
        return torch.linalg.vector_norm(self._weight, dim=1, dtype=self._dtype)

    def column_norms(self) -> Tensor:
        return torch.linalg.vector_norm(self._weight, dim=0, dtype=self._dtype)

    def base(self, v: Tensor) -> Tensor:
        y = self.project(v)
        return y if self._bias is None else y + self._bias

    def project(self, v: Tensor) -> Tensor:
        return product(v.to(self._dtype), self._weight)

    def dropout(self, x: Tensor) -> Tensor:
        return x


ROWS = 128
"""Rows of a weight that are cast at a time."""


def product(v: Any, w: Tensor) -> Tensor:
    """v Wᵀ in v's dtype, without a cast copy of W."""
    if v.dtype == w.dtype:
        return v @ w.mT
    return torch.cat([v @ rows.to(v.dtype).mT for rows in w.split(ROWS)], -1)


if TYPE_CHECKING:  # what pages are typed with is what they get
    _: type[Layer[AdapterConfig]] = LayerView
