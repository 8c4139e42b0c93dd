"""Attention: queries, keys and values before their scores, in models that ask transformers for the function.

Such a module looks the function up by a name in its config. While adapters stand on it, its config is a `Redirect`,
whose name leads to the library and which is the model's own config in everything else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import SelectionError, TargetError
from ..model.kind import Hooks, Kind
from .linear import run_bare

NAME = "lora_lite"
"""Under this name transformers finds the library's attention function."""
OPEN = ("eager", "sdpa")
"""Implementations whose masks can be widened."""
CURE = "Call model.set_attn_implementation('sdpa') before the adapter is attached."
Attend = Callable[..., tuple[Tensor, Any]]


class Redirect:
    """The config of an attention module, but for the name of its attention function."""

    _attn_implementation = NAME

    def __init__(self, config: Any, attend: Attend) -> None:
        self.__setstate__({"config": config, "attend": attend})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "config" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["config"], name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.__dict__.update(state)
        ALL_ATTENTION_FUNCTIONS.register(NAME, state["attend"])


class Attention(Kind):
    """Self-attention; d_in = the width of its hidden states, d_out = that of its keys and of its values."""

    name = "attention"
    apart = True
    offered = False
    attends = True
    absent = (
        "the model has none that asks transformers for its attention function (ALL_ATTENTION_FUNCTIONS). Models of "
        "transformers with set_attn_implementation('sdpa') do."
    )

    def size(self, module: nn.Module) -> tuple[int, int] | None:
        config = module.__dict__.get("config")
        if "Attention" not in type(module).__name__ or not hasattr(config, "_attn_implementation"):
            return None
        if not hasattr(module, "is_causal") or hasattr(module, "v_head_dim") or _is_cross(module):
            return None
        if not isinstance(getattr(config, "num_attention_heads", None), int):  # Swin has a list, one number per stage
            return None
        return int(config.hidden_size), self.heads(module)[1] * self.head_dim(module)  # type: ignore[union-attr]

    def heads(self, module: nn.Module) -> tuple[int, int]:
        """Number of heads of the queries, and of the keys and values."""
        n: Any = module.config.num_attention_heads  # type: ignore[union-attr]
        return int(n), int(n // getattr(module, "num_key_value_groups", 1))

    def head_dim(self, module: nn.Module) -> int:
        """Width of a head."""
        config: Any = module.config
        own = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
        return int(own or config.hidden_size // config.num_attention_heads)

    def refuse(self, module: nn.Module, path: str, variant: Any, cfg: Any) -> str:
        how = implementation(module)
        if variant.tokens is not None and not (module.is_causal and hasattr(module, "layer_idx")):
            return (
                f"variant {variant.name!r} puts virtual tokens before the text, which needs a causal decoder: here "
                "later tokens would act on them. Keys and values that are trained themselves can stand there."
            )
        return "" if how in OPEN else f"its scores are computed by {how!r}, whose masks cannot be widened. {CURE}"

    def sample(self, module: nn.Module, rows: Tensor, columns: Tensor) -> None:
        return None

    def join(self, module: nn.Module, path: str, hooks: Hooks) -> None:
        """Lead the module's scores to `hooks.after`."""
        module.config = Redirect(module.config, hooks.after)  # type: ignore[assignment]

    def part(self, module: nn.Module, path: str, hooks: Hooks) -> None:
        if isinstance(module.config, Redirect):
            module.config = module.config.__dict__["config"]

    def keys_and_values(self, module: nn.Module, v: Tensor) -> tuple[Tensor, Tensor]:
        """What the module makes of hidden states v (n, d_in) that have no position: keys and values (n, d_out).

        Raises:
            TargetError: it has no projections of the usual names.
        """
        own = module._modules
        if "k_proj" in own and "v_proj" in own:
            return run_bare(own["k_proj"], v), run_bare(own["v_proj"], v)  # type: ignore[arg-type]
        if "c_attn" in own:
            _, K, V = run_bare(own["c_attn"], v).chunk(3, -1)  # type: ignore[arg-type]
            return K, V
        raise TargetError(
            f"{type(module).__name__} has neither k_proj and v_proj nor c_attn, so what it would make of trained "
            "hidden states cannot be told. Use a method that trains keys and values themselves."
        )

    def split(self, module: nn.Module, t: Tensor) -> Tensor:
        """Keys or values (..., n, d_out) -> (..., heads, n, head_dim)."""
        return t.unflatten(-1, (self.heads(module)[1], self.head_dim(module))).transpose(-2, -3)

    def scored(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **more: Any
    ) -> tuple[Tensor, Any]:
        """The module's own attention function: (y (B, T, heads, head_dim), its weights or None)."""
        how = implementation(module)
        if how not in OPEN:
            raise SelectionError(f"attention is computed by {how!r} now, whose masks cannot be widened. {CURE}")
        return _function(module, how)(module, q, k, v, mask, **more)

    def widened(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, extra: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask with `extra` keys and values (B or 1, heads, n, head_dim) before them, which every
        query sees."""
        T, n = q.shape[2], extra[0].shape[2]
        if mask is None and T > 1 and getattr(module, "is_causal", True) and implementation(module) == "sdpa":
            k, v = k[:, :, :T], v[:, :, :T]  # as sdpa cuts a cache of fixed size
            mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            room = (*mask.shape[:-1], n)
            mask = torch.cat((mask.new_ones(room) if mask.dtype == torch.bool else mask.new_zeros(room), mask), -1)
        K, V = (t.to(old.dtype).expand(old.shape[0], -1, -1, -1) for t, old in zip(extra, (k, v), strict=True))
        return torch.cat((K, k), 2), torch.cat((V, v), 2), mask

    def attend(self, module: nn.Module, q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """softmax(q Kᵀ) V over keys and values (n, d_out) of their own: q (B, T, heads · head_dim) -> the same."""
        heads, own = self.heads(module)
        q, K, V = q.unflatten(-1, (heads, -1)).transpose(1, 2), self.split(module, K), self.split(module, V)
        K, V = (t.repeat_interleave(heads // own, 0) for t in (K, V))
        weights = (q @ K.mT * getattr(module, "scaling", self.head_dim(module) ** -0.5)).softmax(-1)
        return (weights @ V).transpose(1, 2).flatten(2)


def implementation(module: nn.Module) -> str:
    """The name of the attention function that the model would call without adapters."""
    config: Any = module.config
    config = config.__dict__["config"] if isinstance(config, Redirect) else config
    return str(config._attn_implementation)


def _function(module: nn.Module, how: str) -> Attend:
    """The function itself: an eager one stands in the file of its model."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if how in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[how]
    return sys.modules[type(module).__module__].eager_attention_forward


def _is_cross(module: nn.Module) -> bool:
    return bool(getattr(module, "is_cross_attention", False)) or "Cross" in type(module).__name__
