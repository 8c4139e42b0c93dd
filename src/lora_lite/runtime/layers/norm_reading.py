"""Norms as layers that multiply each feature of a normalised input by one number: which features, and how they are
normalised.

What a foreign class computes is not taken from its name: it is tried on random vectors with random parameters, as it
would be run.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._torch import is_fake
from ...core.errors import TargetError
from ..model.site import Site, adapter_attributes
from ..model.state import SITE

EPS = ("eps", "variance_epsilon", "epsilon", "norm_eps")
"""Attributes under which norms keep what they add to the variance."""


@dataclass(frozen=True)
class Norm:
    """y = n(x) (weight + offset) + bias."""

    centred: bool
    """n subtracts the mean (LayerNorm), or does not (RMSNorm)."""
    eps: float | None
    offset: float
    """1 where the stored weight is a deviation from 1, as in Gemma."""

    def gain(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """What multiplies n(x), offset included."""
        weight = module._parameters["weight"]
        assert weight is not None
        return weight.detach().to(dtype) + self.offset

    def normalise(self, x: Tensor) -> Tensor:
        """n(x) over the last dimension, in x's dtype."""
        d = (x.shape[-1],)
        return F.layer_norm(x, d, eps=self.eps or 0.0) if self.centred else F.rms_norm(x, d, eps=self.eps)


def norm_width(module: nn.Module) -> int | None:
    """The number of features of a norm over the last dimension with one weight each; None for any other module."""
    w = module._parameters.get("weight")
    if w is None or w.dim() != 1 or "norm" not in type(module).__name__.lower() or any(True for _ in module.children()):
        return None
    if isinstance(module, nn.GroupNorm) or "running_mean" in module._buffers:  # channels lie elsewhere
        return None
    takes = list(inspect.signature(type(module).forward).parameters)
    if len(takes) != 2 or not _has_weight_and_bias(module, w):  # self and x: a gated norm takes more
        return None
    return int(w.shape[0])


def _has_weight_and_bias(module: nn.Module, w: Tensor) -> bool:
    """Whether its own parameters are the weight and, perhaps, a bias of the same shape."""
    adapters = adapter_attributes(module)
    own = {k: p for k, p in module._parameters.items() if p is not None and k not in adapters}
    return set(own) <= {"weight", "bias"} and all(p.shape == w.shape for p in own.values())


@torch.no_grad()
def read_norm(module: nn.Module, path: str) -> Norm:
    """What the module does to its input.

    Raises:
        TargetError: it is neither y = n(x) w + b with n an RMS or layer norm, nor y = n(x) (1 + w) + b.
    """
    if type(module).forward is nn.LayerNorm.forward:
        return Norm(True, module.eps, 0.0)  # pyright: ignore[reportArgumentType]
    if type(module).forward is nn.RMSNorm.forward:
        return Norm(False, module.eps, 0.0)  # pyright: ignore[reportArgumentType]
    norm = _tried(module)
    if norm is None:
        raise TargetError(
            f"{path}: this {type(module).__name__} computes something else than a layer norm or an RMS norm with a "
            "weight per feature, so it cannot be trained. Take it out of the patterns."
        )
    return norm


def _tried(module: nn.Module) -> Norm | None:
    """The norm that gives what the module gives, for random vectors and parameters; None where none does."""
    eps = next((v for k in EPS if isinstance(v := getattr(module, k, None), float)), None)
    weight = module._parameters["weight"]
    assert weight is not None
    g = torch.Generator().manual_seed(0)
    draw = torch.randn(6, weight.shape[0], generator=g).to(weight)
    w, b = draw[0], draw[1] if module._parameters.get("bias") is not None else None
    small = draw[2:] + 0.5
    x = torch.cat((small, small * 3 * (eps or 1e-6) ** 0.5))  # where eps counts, and where it does not
    with _given(module, w, b):
        y = module.forward(x)
    if eps is None or not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 0.04
    for norm in (Norm(c, eps, o) for c in (False, True) for o in (0.0, 1.0)):
        want = norm.normalise(x.double()) * (w.double() + norm.offset) + (0 if b is None else b.double())
        if float((y.double() - want).abs().max()) <= tolerance * float(want.abs().max()):
            return norm
    return None


def norm_of(module: nn.Module) -> Norm:
    """What an adapted norm does: read at attach, or now where the model was on the meta device then. Without values,
    any norm's cost."""
    site: Site = module.__dict__[SITE]
    if isinstance(site.found, Norm):
        return site.found
    weight = module._parameters["weight"]
    assert weight is not None
    if weight.is_meta or is_fake(weight):
        return Norm(False, 1e-6, 0.0)
    site.found = norm = read_norm(module, site.path)
    return norm


@contextmanager
def _given(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Iterator[None]:
    """Inside, the module has these parameters."""
    own = dict(module._parameters)
    new: Any = {"weight": weight, "bias": bias}
    try:
        module._parameters.update({k: new[k] for k, p in own.items() if k in new and p is not None})
        yield
    finally:
        module._parameters.update(own)
