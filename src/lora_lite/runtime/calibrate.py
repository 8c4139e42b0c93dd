"""One pass of data over the untouched model, and what a method can learn from it: streamed, padding masked, hooks always removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, StateError
from .staging import StagedTarget

Visit = Callable[[StagedTarget, Tensor, Tensor], None]


@dataclass
class Moments:
    """Sums over the tokens that a target saw: count, Σx, Σ|x|, Σx² per input feature, in fp32."""

    n: int
    sum: Tensor
    abs: Tensor
    square: Tensor


class Targets(list[StagedTarget]):
    """The staged targets of a `group_init`, with statistics of a pass of the data through the bare model."""

    def __init__(self, model: nn.Module, views: Iterable[StagedTarget]) -> None:
        super().__init__(views)
        self.model = model

    def stream(self, data: Any, visit: Visit) -> None:
        """Run the batches in eval mode and call `visit(target, x, y)` with x (n, d_in) and y (n, d_out): the tokens that are no padding."""
        with torch.no_grad(), _pass(self.model):
            for batch, mask in _batches(self.model, data):
                self._run(batch, lambda view, x, y, mask=mask: visit(view, _tokens(x, mask), _tokens(y, mask)))

    def stream_whole(self, data: Any, visit: Callable[[StagedTarget, Tensor, Tensor, Tensor | None], None]) -> None:
        """The same with unflattened tensors and the batch's attention mask: `visit(target, x, y, mask)`."""
        with torch.no_grad(), _pass(self.model):
            for batch, mask in _batches(self.model, data):
                self._run(batch, lambda view, x, y, mask=mask: visit(view, x, y, mask))

    def gram(self, data: Any) -> dict[str, Tensor]:
        """Path -> C = Σ xᵀx, (d_in, d_in) in fp32. Layers that receive the very same tensor share one sum."""
        sums: dict[str, Tensor] = {}
        leader: dict[str, str] = {}
        last: dict[str, Any] = {"x": None, "path": ""}

        def visit(view: StagedTarget, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
            first = last["path"] if last["x"] is x else view.path
            if leader.setdefault(view.path, first) != first:
                raise StateError(
                    f"{view.path}: shared its input with another layer in one batch and not in the next; calibrate with batches of one kind."
                )
            last.update(x=x, path=first)
            if first == view.path:
                tokens = _tokens(x, mask).float()
                sums[first] = torch.addmm(sums[first], tokens.mT, tokens) if first in sums else tokens.mT @ tokens

        self.stream_whole(data, visit)
        self._check_seen(leader)
        return {path: sums[first] for path, first in leader.items()}

    def moments(self, data: Any) -> dict[str, Moments]:
        """Path -> first and second moments of every input feature."""
        found: dict[str, Moments] = {}

        def visit(view: StagedTarget, x: Tensor, y: Tensor) -> None:
            x = x.float()
            m = found.setdefault(view.path, Moments(0, *(x.new_zeros(x.shape[-1]) for _ in range(3))))
            m.n += x.shape[0]
            m.sum += x.sum(0)
            m.abs += x.abs().sum(0)
            m.square += x.square().sum(0)

        self.stream(data, visit)
        self._check_seen(found)
        return found

    def gradients(self, data: Any, loss: Callable[[Any], Tensor] | None = None) -> dict[str, Tensor]:
        """Path -> ∂loss/∂W, (d_out, d_in) in fp32, averaged over the batches: Σ gᵀx from hooks, so W itself never needs a gradient.

        `loss` maps the model's output to a scalar; by default its `.loss`, so put labels into the batches.
        """
        sums: dict[str, Tensor] = {}
        count = 0

        def visit(view: StagedTarget, x: Tensor, y: Tensor) -> Tensor:
            if not y.requires_grad:  # a frozen base builds no graph: start one here
                y = y + torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
            x = x.detach()

            def on_grad(g: Tensor) -> None:
                gx = g.reshape(-1, g.shape[-1]).float().mT @ x.reshape(-1, x.shape[-1]).float()
                sums[view.path] = sums[view.path] + gx if view.path in sums else gx

            y.register_hook(on_grad)
            return y

        with torch.enable_grad(), _pass(self.model), _frozen(self.model):
            for batch, _ in _batches(self.model, data):
                out = self._run(batch, visit)
                value = loss(out) if loss is not None else getattr(out, "loss", None)
                if not isinstance(value, Tensor):
                    raise ConfigError(
                        "the gradient needs a loss: put labels into the calibration batches, so that the model's output has .loss."
                    )
                torch.autograd.backward(value)
                count += 1
        self._check_seen(sums)
        return {path: g / count for path, g in sums.items()}

    def _run(self, batch: Any, visit: Callable[..., Any]) -> Any:
        handles = []

        def hook_for(view: StagedTarget) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
                y = output[0] if isinstance(output, tuple) else output
                new = visit(view, x, y)
                return None if new is None else (new, *output[1:]) if isinstance(output, tuple) else new

            return hook

        try:
            handles += [view.module.register_forward_hook(hook_for(view), with_kwargs=True) for view in self]
            if isinstance(batch, Mapping):
                return self.model(**batch)
            return self.model(*batch) if isinstance(batch, (tuple, list)) else self.model(batch)
        finally:
            for h in handles:
                h.remove()

    def _check_seen(self, found: Mapping[str, Any]) -> None:
        missing = [v.path for v in self if v.path not in found]
        if missing:
            raise StateError(
                f"the calibration data never reached {missing[0]!r} and {len(missing) - 1} more targets; add them to exclude_names."
            )


@contextmanager
def _pass(model: nn.Module) -> Iterator[None]:
    """Eval mode, with every module's own mode and the parameters' flags restored; existing adapters do not act."""
    from .select import active
    from .state import STATE

    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        if STATE in model.__dict__:
            with active(model, None):
                yield
        else:
            yield
    finally:
        for m, mode in modes.items():
            m.training = mode


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter collects a gradient inside; the flags come back afterwards."""
    flagged = [p for p in model.parameters() if p.requires_grad]
    for p in flagged:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in flagged:
            p.requires_grad_(True)


def _batches(model: nn.Module, data: Any) -> Iterator[tuple[Any, Tensor | None]]:
    """(batch on the model's device, its attention mask) of every batch."""
    if isinstance(data, (Mapping, Tensor)):
        data = [data]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    n = 0
    for batch in data:
        n += 1
        if isinstance(batch, Mapping):
            batch = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
            yield batch, batch.get("attention_mask")
        elif isinstance(batch, (tuple, list)):
            yield [v.to(device) if isinstance(v, Tensor) else v for v in batch], None
        elif isinstance(batch, Tensor):
            yield batch.to(device), None
        else:
            raise ConfigError(f"a calibration batch is a dict, a tuple or a tensor; got {type(batch).__name__}.")
    if n == 0:
        raise ConfigError("calibration_data is empty, or an iterator that was used up; pass a list or a DataLoader.")


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """(n, d): all tokens of x, without those that the mask calls padding."""
    if mask is None or mask.dim() != 2:
        return x.reshape(-1, x.shape[-1])
    if x.shape[:2] == mask.shape and x.dim() == 3:
        return x[mask.bool()]
    if x.dim() == 2 and x.shape[0] == mask.numel():
        return x[mask.flatten().bool()]
    return x.reshape(-1, x.shape[-1])
