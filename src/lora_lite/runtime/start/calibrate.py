"""One pass of data over the untouched model, and what a method can learn from it: streamed, padding masked, hooks
always removed.

Every rank of a distributed run should be given the same batches, so that all start from the same adapter.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from ...core.config import AdapterConfig
from ...core.errors import ConfigError, StateError
from ...core.targets import Targets as Promised
from ...ops.spectrum import top_eigh, top_eigh_of_rows
from ..call.batch import call_batch, evaluating
from ..call.hooks import first_name
from ..call.scope import nobody_acts
from ..layers.linear import dims
from ..layers.read import is_quantised
from ..model.state import STATE
from ..model.undo import surely
from ..progress import track
from .gradients import Gradient
from .staging import StagedTarget

Visit = Callable[[StagedTarget, Tensor, Tensor], None]
VisitWhole = Callable[[StagedTarget, Tensor, Tensor, "Tensor | None"], None]
FEW = 4
"""Tokens are few while there are at least so many inputs for each."""
IGNORED = -100
"""The label that a loss leaves out."""


@dataclass
class Moments:
    """Sums over the tokens that a target saw: count, Σx, Σ|x|, Σx² per input feature, in fp32 or better."""

    n: int
    sum: Tensor
    abs: Tensor
    square: Tensor


class Gram:
    """Σ xᵀx (d_in, d_in) and Σ x (d_in,) over n tokens, in fp32 or better, of the targets that receive one and the same
    tensor.

    While the tokens are few beside the inputs they are kept themselves: they are smaller than the sum, and so is the
    decomposition of their products with each other.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.views: list[StagedTarget] = []
        self.n = 0
        self._tokens: list[Tensor] = []
        self._sum = tokens.new_zeros(0)
        self.sum = tokens.new_zeros(tokens.shape[-1])
        self._d = tokens.shape[-1]

    def add(self, tokens: Tensor) -> None:
        """Count some tokens (n, d_in)."""
        self.n += tokens.shape[0]
        self.sum.add_(tokens.sum(0))
        self._tokens.append(tokens.clone())
        if len(self._sum) or FEW * self.n > self._d:
            self._fold()

    def _fold(self) -> None:
        if not len(self._sum):
            self._sum = self._tokens[0].new_zeros(self._d, self._d)
        for tokens in self._tokens:
            self._sum.addmm_(tokens.mT, tokens)
        self._tokens.clear()

    @property
    def C(self) -> Tensor:
        self._fold()
        return self._sum

    def times(self, v: Tensor) -> Tensor:
        """C v for v (d_in, b), without C while the tokens are few."""
        if len(self._sum):
            return (self._sum @ v.to(self._sum)).to(v)
        result = self.sum.new_zeros(v.shape)
        for tokens in self._tokens:
            result.addmm_(tokens.mT, tokens @ v.to(tokens))
        return result.to(v)

    @property
    def trace(self) -> Tensor:
        """Σ ‖x‖²."""
        if len(self._sum):
            return self._sum.trace()
        return torch.stack([tokens.square().sum() for tokens in self._tokens]).sum()

    def leading(self, k: int, centred: bool = False) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues (k,), descending, and eigenvectors (d_in, k), signs fixed; of the tokens without
        their mean, where that is asked for."""
        mean = self.sum / self.n
        if not len(self._sum):
            tokens = torch.cat(self._tokens)
            found = top_eigh_of_rows(tokens - mean if centred else tokens, k)
            if found is not None:
                return found
        return top_eigh(self.C - torch.outer(self.sum, mean) if centred else self.C, k)


class Targets(list[StagedTarget]):
    """The staged targets of a `group_init`, with statistics of a pass of the data through the bare model.

    Take targets out of this list to leave them unadapted; `view.resize(r=...)` changes a rank. A batch is a dict
    (`model(**batch)`), a tuple or a tensor. A dict's `attention_mask` (batch, tokens) says which tokens count. Layers
    that see routed tokens (mixtures of experts) count all they receive.
    """

    def __init__(self, model: nn.Module, views: Iterable[StagedTarget]) -> None:
        super().__init__(views)
        self.model = model

    def stream(self, data: Any, visit: Visit, labelled: bool = False) -> None:
        """Run the batches in eval mode and call `visit(target, x, y)` with x (n, d_in) and y (n, d_out): the tokens
        that are no padding.

        `labelled` also leaves out the tokens whose label is -100.
        """
        self.stream_whole(data, lambda view, x, y, mask: visit(view, _tokens(x, mask), _tokens(y, mask)), labelled)

    def stream_whole(
        self, data: Any, visit: VisitWhole, labelled: bool = False, views: list[StagedTarget] | None = None
    ) -> None:
        """The same with unflattened tensors and the batch's mask (batch, tokens) or None: `visit(target, x, y,
        mask)`."""
        with torch.no_grad(), _untouched(self.model):
            for batch, mask in _batches(self.model, data, labelled):
                self._run(batch, lambda view, x, y, mask=mask: visit(view, x, y, mask), views or self)

    def each_gram(self, data: Any, labelled: bool = False, budget: int | None = None) -> Iterator[Gram]:
        """C = Σ xᵀx of one distinct input after the other. Layers that receive the very same tensor share one sum.

        At most `budget` bytes of sums are held at once (default: half of the free memory); what does not fit waits for
        another pass of the data, so data that can be read only once raises then. Keep no sum longer than needed.
        """
        budget = _free_bytes(self) if budget is None else budget
        pending = list(self)
        while pending:
            grams, leader = _grams_of_pass(self, data, labelled, budget, pending)
            self._check_seen(leader, pending)
            pending = [v for v in pending if leader[v.path] not in grams]
            for path in list(grams):
                gram = grams.pop(path)
                _check_finite(gram.trace, path)
                yield gram

    def gram(self, data: Any, labelled: bool = False) -> dict[str, Tensor]:
        """Path -> C = Σ xᵀx, (d_in, d_in), all at once; targets that receive the very same tensor share one C."""
        grams = list(self.each_gram(data, labelled, budget=1 << 62))
        return {view.path: g.C for g in grams for view in g.views}

    def moments(self, data: Any, labelled: bool = False) -> dict[str, Moments]:
        """Path -> first and second moments of every input feature."""
        found: dict[str, Moments] = {}

        def visit(view: StagedTarget, x: Tensor, y: Tensor) -> None:
            x = _precise(x)
            m = found.setdefault(view.path, Moments(0, *(x.new_zeros(x.shape[-1]) for _ in range(3))))
            m.n += x.shape[0]
            m.sum += x.sum(0)
            m.abs += x.abs().sum(0)
            m.square += x.square().sum(0)

        self.stream(data, visit, labelled)
        self._check_seen(found)
        return found

    def each_gradient(
        self, data: Any, loss: Callable[[Any], Tensor] | None = None, budget: int | None = None
    ) -> Iterator[tuple[StagedTarget, Tensor]]:
        """(target, ∂loss/∂W (d_out, d_in) in fp32 or better), averaged over the batches: Σ gᵀx from hooks, so W itself
        never needs a gradient.

        `loss` maps the model's output to a scalar; by default its `.loss`, so put labels into the batches (labels of
        padding are ignored). At most `budget` bytes of gradients are held at once, as in `each_gram`.
        """
        for view, gradient in self._each_gradient(data, loss, budget):
            yield view, gradient.dense()

    def each_gradient_svd(
        self, data: Any, rank: Callable[[StagedTarget], int], loss: Callable[[Any], Tensor] | None = None
    ) -> Iterator[tuple[StagedTarget, Tensor, Tensor, Tensor]]:
        """(target, U, S, V): the k = rank(target) largest singular triplets of ∂loss/∂W, U (d_out, k), S (k,), V (d_in,
        k), signs fixed. Few tokens are decomposed themselves, without a gradient of the weight's size."""
        for view, gradient in self._each_gradient(data, loss, None):
            yield view, *gradient.leading(rank(view))

    def _each_gradient(
        self, data: Any, loss: Callable[[Any], Tensor] | None, budget: int | None
    ) -> Iterator[tuple[StagedTarget, Gradient]]:
        budget = _free_bytes(self) if budget is None else budget
        pending = list(self)
        while pending:
            group, used = [], 0
            while pending and (not group or used + _bytes(pending[0]) <= budget):
                used += _bytes(pending[0])
                group.append(pending.pop(0))
            sums = self._gradients(data, loss, group)
            for view in group:
                gradient = sums.pop(view.path)
                if not gradient.finite:
                    _not_finite(view.path)
                yield view, gradient

    def gradients(self, data: Any, loss: Callable[[Any], Tensor] | None = None) -> dict[str, Tensor]:
        """Path -> ∂loss/∂W, all at once; see `each_gradient`."""
        return {view.path: g for view, g in self.each_gradient(data, loss, budget=1 << 62)}

    def _gradients(
        self, data: Any, loss: Callable[[Any], Tensor] | None, views: list[StagedTarget]
    ) -> dict[str, Gradient]:
        sums: dict[str, Gradient] = {}
        count = 0

        def visit(view: StagedTarget, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
            if not y.requires_grad:  # a frozen base builds no graph: start one here
                y = y + torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
            x = x.detach()

            def on_grad(g: Tensor) -> None:
                g, tokens = _precise(_tokens(g, mask)), _precise(_tokens(x, mask))
                sums.setdefault(view.path, Gradient(g.shape[-1], tokens.shape[-1])).add(g, tokens)

            y.register_hook(on_grad)
            return y

        with torch.enable_grad(), _untouched(self.model), _frozen(self.model):
            for batch, mask in _batches(self.model, data):
                out = self._run(batch, lambda view, x, y, mask=mask: visit(view, x, y, mask), views)
                value = loss(out) if loss is not None else getattr(out, "loss", None)
                if not isinstance(value, Tensor):
                    raise ConfigError(
                        "the gradient needs a loss: put labels into the calibration batches, so that the model's "
                        "output has .loss."
                    )
                if value.requires_grad:
                    torch.autograd.backward(value)
                count += 1
        self._check_seen(sums, views)
        for gradient in sums.values():
            gradient.share = 1 / count
        return sums

    def remembered(self, data: Any, n: int) -> Iterator[tuple[StagedTarget, Tensor, Tensor]]:
        """(target, keys (n, d_out), values (n, d_out)) of the first n tokens of the longest row of the data, at the
        attention of a model with a key-value cache.

        Raises:
            ConfigError: that row is shorter, or a batch is no dict.
        """
        from transformers import DynamicCache

        cache, length, row = DynamicCache(), 0, {}
        for batch, mask in _batches(self.model, data):
            row, length = max((row, length), _longest(batch, mask), key=lambda found: found[1])
        if length < n:
            raise ConfigError(
                f"the longest row of calibration_data has {length} tokens, and {n} keys and values are to start from "
                f"them; give a longer text, or set r={length}."
            )
        with torch.no_grad(), _untouched(self.model):
            call_batch(self.model, {**row, "past_key_values": cache, "use_cache": True})
        for view in self:
            layer: Any = cache.layers[view.module.layer_idx]  # type: ignore[index]
            K, V = (t[0].transpose(0, 1).flatten(1)[:n] for t in (layer.keys, layer.values))
            yield view, K, V

    def _run(self, batch: Any, visit: Callable[..., Any], views: list[StagedTarget]) -> Any:
        handles = []

        def hook_for(view: StagedTarget) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                x = args[0] if args else kwargs[first_name(module, kwargs)]
                y = output[0] if isinstance(output, tuple) else output
                new = visit(view, x, y)
                return (new, *output[1:]) if new is not None and isinstance(output, tuple) else new

            return hook

        try:
            for view in views:
                handles.append(view.module.register_forward_hook(hook_for(view), with_kwargs=True))
            return call_batch(self.model, batch)
        finally:
            for h in handles:
                h.remove()

    def _check_seen(self, found: Iterable[str], views: list[StagedTarget] | None = None) -> None:
        seen = set(found)
        missing = [v.path for v in views or self if v.path not in seen]
        if missing:
            more = f" and {len(missing) - 1} more targets" if len(missing) > 1 else ""
            raise StateError(f"the calibration data never reached {missing[0]!r}{more}; add them to exclude_names.")


def _grams_of_pass(
    targets: Targets, data: Any, labelled: bool, budget: int, views: list[StagedTarget]
) -> tuple[dict[str, Gram], dict[str, str]]:
    """Sums of those inputs that fit into the budget, and path -> path of the target whose input it shares."""
    by_path = {v.path: v for v in views}
    grams: dict[str, Gram] = {}
    leader: dict[str, str] = {}
    postponed: set[str] = set()
    last: dict[str, Any] = {"x": None, "version": -1, "path": ""}
    used = 0

    def visit(view: StagedTarget, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        nonlocal used
        version = 0 if x.is_inference() else x._version  # the same object may have been changed in place
        first = last["path"] if last["x"] is x and last["version"] == version else view.path
        if leader.setdefault(view.path, first) != first:
            raise StateError(
                f"{view.path}: shared its input with another layer in one batch and not in the next; calibrate with "
                "batches of one kind."
            )
        last.update(x=x, version=version, path=first)
        if first != view.path or first in postponed:
            return
        tokens = _precise(_tokens(x, mask))
        if first not in grams:
            size = tokens.shape[-1] ** 2 * tokens.element_size()
            if grams and used + size > budget:
                postponed.add(first)
                return
            used += size
            grams[first] = Gram(tokens)
        grams[first].add(tokens)

    targets.stream_whole(data, visit, labelled, views)
    for path, first in leader.items():
        if first in grams:
            grams[first].views.append(by_path[path])
    return grams, leader


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode, with every module's own mode restored; existing adapters do not act."""
    with evaluating(model):
        for m in model.modules():
            if dims(m) is not None and is_quantised(m):
                m.training = True  # bitsandbytes repacks the weight of a layer on the CPU that evaluates
        if STATE not in model.__dict__:
            yield
            return
        with nobody_acts(model):
            yield


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter collects a gradient inside; the flags come back afterwards."""
    flagged = [p for p in model.parameters() if p.requires_grad]

    def restore() -> None:
        for p in flagged:
            p.requires_grad_(True)

    with surely(restore):
        for p in flagged:
            p.requires_grad_(False)
        yield


def _batches(model: nn.Module, data: Any, labelled: bool = False) -> Iterator[tuple[Any, Tensor | None]]:
    """(batch on the model's device, the (batch, tokens) mask of the tokens that count) of every batch."""
    if isinstance(data, (Mapping, Tensor)):
        data = [data]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    cache = "use_cache" in inspect.signature(model.forward).parameters  # a cache would only cost memory
    batch = None
    for batch in track(data, "calibration") if hasattr(data, "__len__") else data:
        if isinstance(batch, Mapping):
            moved = _moved(batch, device)
            mask = _mask(moved, labelled)
            yield ({"use_cache": False} if cache else {}) | moved, mask
        elif isinstance(batch, (tuple, list)):
            yield [v.to(device) if isinstance(v, Tensor) else v for v in batch], None
        elif isinstance(batch, Tensor):
            yield batch.to(device), None
        else:
            raise ConfigError(f"a calibration batch is a dict, a tuple or a tensor; got {type(batch).__name__}.")
    if batch is None:
        raise ConfigError("calibration_data is empty, or an iterator that was used up; pass a list or a DataLoader.")


def _longest(batch: Any, mask: Tensor | None) -> tuple[dict[str, Any], int]:
    """The row of a batch with the most tokens, as a batch without padding, and their number."""
    named = {k: v for k, v in batch.items() if isinstance(v, Tensor)} if isinstance(batch, Mapping) else {}
    tokens = next((v for v in named.values() if v.dim() > 1), None)
    if tokens is None:
        raise ConfigError("keys and values are remembered from batches that are dicts, model(**batch).")
    keep = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask.bool()
    i = int(keep.sum(1).argmax())
    alike = {k: v for k, v in named.items() if v.shape[:2] == tokens.shape[:2] and k != "attention_mask"}
    return {k: v[i, keep[i]][None] for k, v in alike.items()}, int(keep[i].sum())


def _moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A dict's tensors on the device; there must be one."""
    if not any(isinstance(v, Tensor) for v in batch.values()):
        raise ConfigError(
            f"a calibration batch holds no tensor (keys {sorted(batch)}): tokenize with return_tensors='pt', or pass a "
            "DataLoader."
        )
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _mask(batch: dict[str, Any], labelled: bool) -> Tensor | None:
    """The tokens that count. Labels of padding are set to -100 in the batch, so that no loss can see them."""
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if mask is not None:
        if mask.dim() != 2:
            raise ConfigError(
                f"attention_mask has shape {tuple(mask.shape)}; calibration needs (batch, tokens), to leave padding "
                "out."
            )
        mask = mask.bool()
        if isinstance(labels, Tensor) and labels.shape == mask.shape and not labels.is_floating_point():
            batch["labels"] = labels = labels.masked_fill(~mask, IGNORED)
    if labelled:
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            raise ConfigError(
                "only labelled tokens were asked for, and a calibration batch has no labels (batch, tokens)."
            )
        mask = labels != IGNORED if mask is None else mask & (labels != IGNORED)
    return None if mask is None or bool(mask.all()) else mask


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """(n, d): all tokens of x, without those that the mask leaves out."""
    if mask is not None and x.dim() >= 3 and x.shape[:2] == mask.shape:
        x = x[mask.to(x.device)]
    elif mask is not None and x.dim() == 2 and x.shape[0] == mask.numel():
        x = x[mask.to(x.device).flatten()]
    return x.reshape(-1, x.shape[-1])


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(torch.float32, x.dtype))


def _check_finite(t: Tensor, path: str) -> None:
    if not bool(torch.isfinite(t).all()):
        _not_finite(path)


def _not_finite(path: str) -> NoReturn:
    raise StateError(
        f"{path}: the calibration data gave values that are not finite; look at the batches and the model's dtype."
    )


def _bytes(view: StagedTarget) -> int:
    return 4 * view.in_features * view.out_features


def _free_bytes(views: list[StagedTarget]) -> int:
    """Half of the free memory where the layers lie; no limit where that is unknown."""
    device = views[0].device
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + unused) // 2
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return max(1 << 30, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return 1 << 62


if TYPE_CHECKING:
    _: type[Promised[AdapterConfig]] = Targets
