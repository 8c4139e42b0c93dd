"""`ParamSpec`: one tensor that a variant wants on a target, and how it starts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from .errors import ConfigError, shown


def _kaiming(t: Tensor, g: Generator) -> None:
    """U(±1/√fan_in), fan_in = the last dimension: what nn.Linear and the LoRA paper's code draw."""
    bound = 1 / math.sqrt(t.shape[-1])
    t.uniform_(-bound, bound, generator=g)


_INITS: dict[str, Callable[[Tensor, Generator], object]] = {
    "zeros": lambda t, g: t.zero_(),
    "ones": lambda t, g: t.fill_(1),
    "kaiming": _kaiming,
    "normal": lambda t, g: t.normal_(generator=g),
    "empty": lambda t, g: t.zero_(),  # the variant's init fills it
}
ELSEWHERE = {
    "near_zero": "write 'normal:1e-4', or 'zeros', from which the fresh adapter is the base bit for bit",
    "near_one": "write 'zeros' and use 1 + the tensor, so that the fresh adapter is the base bit for bit",
}
"""Starts of the original lora-lite -> what to write here."""


@dataclass(frozen=True)
class ParamSpec:
    """One adapter tensor.

    Args:
        shape: its shape; never `()`, since FSDP refuses 0-dim parameters (use `(1,)`).
        init: "zeros", "ones", "kaiming" (U(±1/√last dim)), "normal" (N(0, 1)), "normal:STD", "constant:VALUE", "empty"
            (filled by the variant's `init`), or a callable `(tensor, generator)` that fills in place. One that takes
            the tensor alone finds torch's global generator seeded for this tensor.
        trainable: False makes a parameter that no optimiser sees.
        as_buffer: True makes a buffer: saved, never trained.
        decay: False asks for weight decay 0 in `adapter.param_groups` (gains, rotations, magnitudes).
        lr_ratio: the tensor's learning rate divided by the base one (LoRA+).
        dtype: None takes the config's dtype; otherwise this one (integer indices).
        below: of whole numbers 0, 1, ..., below - 1, which a file must keep to; a tuple bounds each row of the last
            two dimensions on its own.
    """

    shape: tuple[int, ...]
    init: str | Callable[[Tensor, Generator], object] = "zeros"
    trainable: bool = True
    as_buffer: bool = False
    decay: bool = True
    lr_ratio: float = 1.0
    dtype: torch.dtype | None = None
    below: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        try:
            whole = tuple(int(n) for n in self.shape)
        except (TypeError, ValueError, OverflowError):
            whole = None
        if whole is None or whole != tuple(self.shape):  # d_in / 2 is welcome where it is whole
            raise ConfigError(
                f"ParamSpec's shape is a tuple of whole numbers such as (cfg.r, d_in), got {shown(self.shape)}."
            )
        object.__setattr__(self, "shape", whole)
        if not self.shape:
            raise ConfigError("ParamSpec has shape (); write (1,): sharded training refuses 0-dim parameters.")
        if min(self.shape) < 1:
            raise ConfigError(f"ParamSpec has the empty shape {self.shape}.")
        self._check_kinds()
        if isinstance(self.init, str) and self.init in ELSEWHERE:
            raise ConfigError(f"init={self.init!r} is no start here: {ELSEWHERE[self.init]}.")
        if isinstance(self.init, str) and self.init.partition(":")[0] not in {*_INITS, "constant"}:
            raise ConfigError(
                f"unknown init {self.init!r}; use one of {sorted(_INITS)}, 'normal:STD', 'constant:VALUE' or a "
                "callable."
            )

    def _check_kinds(self) -> None:
        given: dict[str, Any] = vars(self)
        for name in ("trainable", "as_buffer", "decay"):
            if not isinstance(given[name], bool):
                raise ConfigError(f"ParamSpec's {name} is True or False, got {shown(given[name])}.")
        ratio, dtype, init = given["lr_ratio"], given["dtype"], given["init"]
        if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 <= ratio < math.inf:
            raise ConfigError(f"ParamSpec's lr_ratio is a number from 0 on, got {shown(ratio)}.")
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ConfigError(f"ParamSpec's dtype is a torch.dtype such as torch.int64, or None, got {shown(dtype)}.")
        if not isinstance(init, str) and not callable(init):
            raise ConfigError(
                f"ParamSpec's init is a word such as 'zeros' or a function that fills the tensor, got {shown(init)}."
            )
        below: Any = given["below"]
        bounds: list[Any] = [*below] if isinstance(below, tuple) else [below]
        if below is not None and not all(isinstance(n, int) and not isinstance(n, bool) for n in bounds):
            text = shown(given["below"])
            raise ConfigError(f"ParamSpec's below is a whole number or a tuple of them, got {text}.")

    @property
    def is_trained(self) -> bool:
        """Whether an optimiser sees this tensor."""
        return self.trainable and not self.as_buffer

    def holds(self, t: Tensor) -> bool:
        """Whether values from elsewhere lie in the declared range."""
        if self.below is None or not t.numel():
            return True
        bound = torch.tensor(self.below, device=t.device)[..., None]
        return bool(((t >= 0) & (t < bound)).all())

    def fill(self, t: Tensor, generator: Generator) -> None:
        """Draw the start value into `t`, a CPU tensor in full precision."""
        if callable(self.init):
            _fill_by(self.init, t, generator)
            return
        name, _, value = self.init.partition(":")
        if name == "constant":
            t.fill_(float(value))
        elif name == "normal" and value:
            t.normal_(std=float(value), generator=generator)
        else:
            _INITS[name](t, generator)


def _fill_by(fill: Callable[..., object], t: Tensor, generator: Generator) -> None:
    """Let an author's function fill the tensor, with the generator where it takes one."""
    try:
        takes: list[inspect.Parameter] = list(inspect.signature(fill).parameters.values())
    except ValueError:  # of a function that is not Python's
        takes = []
    if any(p.name == "generator" for p in takes):
        fill(t, generator=generator)
    elif len([p for p in takes if p.default is inspect.Parameter.empty]) > 1:
        fill(t, generator)
    else:
        own: Any = torch.random
        with own.fork_rng(devices=[]):
            own.manual_seed(generator.initial_seed())
            fill(t)
