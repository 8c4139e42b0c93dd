"""What a layer with a forward of its own does, found by trying it: a subclass need not do what its parent does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ..._torch import is_fake, makes_fakes
from .tensors import is_ordinary, is_sharded

LOUD = (3.0, 100.0)
"""Sizes of the outputs on which a layer is tried: what bends only large values (a cap), or only small ones, shows."""
TOLERANCE = 0.05
"""Layers that round their activations to eight bits are within it, and bent ones far outside."""


def has_own_forward(module: nn.Module, plain: set[Any]) -> bool:
    """Whether its class, or the module itself, runs something else than one of the `plain` forwards. What accelerate
    puts around a forward is not looked at."""
    replaced = "forward" in module.__dict__ and "_hf_hook" not in module.__dict__
    return replaced or type(module).forward not in plain


def can_be_tried(module: nn.Module) -> bool:
    """Whether its weight is an ordinary tensor with values here: not packed, sharded, or on the meta device, and no
    mode is on in which tensors have none."""
    w = getattr(module, "weight", None)
    has_values = isinstance(w, Tensor) and not (w.is_meta or is_sharded(w) or is_fake(w))
    return has_values and is_ordinary(w) and not makes_fakes()


@contextmanager
def trying(module: nn.Module) -> Iterator[Any]:
    """A twin of the module in evaluation, which shares its tensors; inside, draws leave no trace. A weight that shows
    nothing (zeros, or values that are not finite) is replaced by a random one."""
    twin = twin_of(module)
    w = twin._parameters.get("weight")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        if w is not None and not 0 < float(w.abs().amax()) < 1e18:
            g = Generator().manual_seed(0)
            twin._parameters["weight"] = torch.randn(w.shape, generator=g).to(w)
        yield twin


def twin_of(module: nn.Module) -> Any:
    """The same layer once more: its own tables, modes and buffers, the same parameters. The layer itself is left
    alone, so that nothing is to be put back."""
    twin: Any = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin._parameters = dict(module._parameters)
    twin._buffers = {k: t if t is None else t.clone() for k, t in module._buffers.items()}
    twin._modules = {k: m if m is None else twin_of(m) for k, m in module._modules.items()}
    twin.training = False
    forward = module.__dict__.get("forward")
    if isinstance(forward, MethodType) and forward.__self__ is module:
        twin.forward = MethodType(forward.__func__, twin)
    return twin


def why_not_affine(module: nn.Module, d_in: int, dtype: torch.dtype) -> str:
    """Why the first thing that it returns is not W x + b, or the rest depends on x too; empty where all is well."""
    w: Any = module.weight
    g = Generator().manual_seed(0)
    x = torch.randn(2, 2, 3, d_in, generator=g).to(device=w.device, dtype=dtype)
    with trying(module) as twin:
        size = float(twin.weight.float().square().sum() / max(1, twin.weight.numel() // d_in)) ** 0.5
        for loud in LOUD:
            a, b = x * (loud / max(size, 1e-30))
            try:
                outs = [_parts(twin.forward(v)) for v in (0 * a, a, b, a + b, -2 * a)]
            except Exception as e:
                return f"cannot be called with one tensor (..., {d_in}): {_said(e)}"
            if why := _bent([y for y, _ in outs], a.shape[:-1]):
                return why
            if any(not _same(rest, outs[0][1]) for _, rest in outs):
                return "returns more that depends on its input than one tensor, which would not be changed with it"
    return ""


def _bent(ys: list[Any], lead: torch.Size) -> str:
    if not all(isinstance(y, Tensor) and y.is_floating_point() and y.shape[:-1] == lead for y in ys):
        return "does not return one vector for each of its input"
    zero, a, b, both, twice = (y.float() for y in ys)
    step = 8 * torch.finfo(ys[0].dtype).eps * max(float(y.abs().max()) for y in (zero, a, b, both, twice))
    size = float((a - zero).abs().max())
    error = max(float((both - b - a + zero).abs().max()), float((twice - zero + 2 * (a - zero)).abs().max()))
    return "" if error <= TOLERANCE * size + step else "is not linear in its input"


def scale_of_lookup(module: nn.Module, size: int) -> tuple[float | None, str]:
    """c where the module returns c · weight[ids], or None and what it does instead."""
    g = Generator().manual_seed(0)
    w: Any = module.weight
    ids = torch.randint(0, size, (3, 5), generator=g).to(w.device)
    with trying(module) as twin:
        try:
            y, rows = twin.forward(ids), twin.weight[ids].double()
        except Exception as e:
            return None, f"cannot be called with token ids alone: {_said(e)}"
    if not isinstance(y, Tensor) or y.shape != rows.shape:
        return None, "does not return one vector for each token"
    c = float((y.double() * rows).sum() / rows.square().sum())
    if float((y.double() - c * rows).abs().max()) > 0.02 * float(rows.abs().max()) * abs(c) or c == 0:
        return None, "does not return the rows of its weight for the token ids, or those times a number"
    return (1.0 if abs(c - 1) < 1e-6 else c), ""


def why_not_the_same(module: nn.Module, parent: Callable[..., Tensor], x: Tensor) -> str:
    """Why it does not do what its parent class would; empty where it does."""
    with trying(module) as twin:
        want = parent(twin, x)
        try:
            y = twin.forward(x)
        except Exception as e:
            return f"cannot be called with one tensor of shape {tuple(x.shape)}: {_said(e)}"
    if not isinstance(y, Tensor) or y.shape != want.shape:
        return "returns something of another shape than its parent class"
    error = float((y.double() - want.double()).abs().max())
    return "" if error <= 0.02 * float(want.abs().max()) else "computes something else than its parent class"


def _parts(out: Any) -> tuple[Any, tuple[Any, ...]]:
    return (out[0], tuple(out[1:])) if isinstance(out, tuple) and out else (out, ())


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    if len(a) != len(b):
        return False
    pairs = zip(a, b, strict=True)
    return all(u is v or (isinstance(u, Tensor) and isinstance(v, Tensor) and torch.equal(u, v)) for u, v in pairs)


def _said(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
