"""What pages compute from their parameters alone, kept while a model generates token by token.

A call that continues a key-value cache comes from the same generation as the call before it, so a rotation or a norm
need not be computed again. Nothing is kept between calls without a cache, in training, with gradients or in compiled
code.
"""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..model.call import Memo, Running
from ..model.site import Slot, tensors_of
from ..model.state import SITE
from .cache import cache_of


def begin(now: Running, model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Open the memo for a root call: the last one's where the call continues the same cache, otherwise an empty one, or
    none."""
    now.memo = None
    cache = cache_of(kwargs)
    if cache is None or model.training or torch.is_grad_enabled() or isinstance(cache, (tuple, list)):
        now.decoding = None
        return
    last = now.decoding
    if last is None or last[0]() is not cache:
        now.decoding = last = (weakref.ref(cache), {})
    now.memo = last[1]


def memo_of(module: nn.Module) -> Memo | None:
    """The memo of the running root call, None where nothing may be kept."""
    site = module.__dict__.get(SITE)
    return None if site is None or torch.is_grad_enabled() else site.state.here.now.memo


def versions(module: nn.Module, slot: Slot) -> tuple[object, ...]:
    """Changes whenever one of the adapter's tensors on this layer is replaced or written."""
    return tuple((id(t), 0 if t.is_inference() else t._version) for t in tensors_of(slot, module))


def cast_once(module: nn.Module, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), kept from token to token while nobody writes it: on a GPU a cast costs as much as a product."""
    if torch.compiler.is_compiling() or (memo := memo_of(module)) is None or tensor.is_inference():
        return tensor.to(dtype)
    key = (id(tensor), dtype)
    kept = memo.get(key)
    if kept is None or kept[0][0] != tensor._version:
        memo[key] = kept = (tensor._version, tensor), tensor.to(dtype)  # held, so that no other tensor gets its id
    return cast(Tensor, kept[1])
