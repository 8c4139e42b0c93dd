"""One variant, one dtype, bias or none: what a check gets to work with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import AdapterConfig
from ..core.errors import LoraLiteError
from ..core.variant import Variant
from ..runtime.attach import attach
from ..runtime.handle import Adapter
from ..runtime.layers.kinds import DEFAULT_KIND, kind_named
from ..runtime.model.site import owned_tensors
from ..runtime.model.state import record_of
from ..runtime.plan import plan
from ..runtime.schedule import schedule
from .toy import WIDTH, AttentiveToy, Toy, batches, experts, pairs, toy

SIZES = ((3, 7.0), (4, 6.0), (2, 5.0), (12, 5.0), (1, 3.0))
"""(r, alpha) to try: alpha differs from r, so that a forgotten scale shows."""


@dataclass
class Case:
    """A variant on the toy model.

    Args:
        variant: the class under test.
        dtype, bias: of the base model.
        options: config fields for every attach, instead of the first (r, alpha) of `SIZES` that the method takes.
        data: `dtype -> calibration_data`, for methods that read other data than the toy's labelled batches.
    """

    variant: type[Variant]
    dtype: torch.dtype = torch.float32
    bias: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    data: Callable[[torch.dtype], Any] = batches

    def __post_init__(self) -> None:
        if self.variant.needs_data == "pairs" and self.data is batches:
            self.data = pairs
        if self.variant.needs_data == "adapters" and self.data is batches:
            self.data = experts
        if (
            "positions" in self.variant.config.__dataclass_fields__
        ):  # the toy's tokens do not mix, and its calls hold no prompt
            self.options = {"positions": "all", **self.options}
        if kind_named(self.variant.site).named:  # the toy's blocks are all the modules that it has
            self.options = {"target_names": (r"layers\.\d",), **self.options}
        if self.linear and DEFAULT_KIND not in self.variant.config().target_kinds:
            self.options = {"target_kinds": (DEFAULT_KIND,), **self.options}
        if self.linear and self.variant.config().target_roles is not None:  # the checks count four layers
            self.options = {"target_roles": None, **self.options}

    def expect(self, condition: Any, sentence: str) -> None:
        """Raise AssertionError with the method's name and the sentence unless the condition holds."""
        if not bool(condition):
            raise AssertionError(f"{self}: {sentence}")

    def raises(self, what: str, *words: str) -> Any:
        """`with case.raises("attaching without data", "calibration_data"):` expects a `LoraLiteError` whose text holds
        the words."""
        return _Raises(self, what, words)

    def __str__(self) -> str:
        return f"{self.variant.name} ({str(self.dtype).removeprefix('torch.')}, {'bias' if self.bias else 'no bias'})"

    @property
    def linear(self) -> bool:
        """Whether it hooks linear layers."""
        return not kind_named(self.variant.site).apart

    @property
    def affine(self) -> bool:
        """Whether it can be merged."""
        return self.variant.affine and self.linear

    @property
    def eps(self) -> float:
        """Half a step of the base's dtype at 1."""
        return torch.finfo(self.dtype).eps / 2

    def cfg(self, **changes: Any) -> AdapterConfig:
        """A config that the method accepts on the toy model."""
        for r, alpha in SIZES:
            try:
                cfg = self.sized(**{"r": r, "alpha": alpha, **self.options, **changes})
                plan(self.model(), cfg)
            except LoraLiteError as e:
                if (r, alpha) == SIZES[-1]:
                    raise AssertionError(
                        f"{self.variant.name}: takes none of the sizes (r, alpha) {SIZES} on 12x20 layers: {e}"
                    ) from e
            else:
                return cfg
        raise AssertionError

    def sized(self, **changes: Any) -> AdapterConfig:
        """A config of the first size, or of the one given, whether or not the method accepts it on the toy model."""
        r, alpha = SIZES[0]
        return self.variant.config(**{"variant": self.variant.name, "r": r, "alpha": alpha, **self.options, **changes})

    def model(self, **changes: Any) -> Toy:
        """The untouched toy model, the same at every call."""
        return toy(**{"bias": self.bias, "dtype": self.dtype, "cls": self.toy, **changes})

    @property
    def toy(self) -> type[Toy]:
        """The toy model on which the method can stand."""
        return AttentiveToy if kind_named(self.variant.site).attends else Toy

    def x(self, *shape: int, seed: int = 5) -> Tensor:
        """Random input (*shape, 12)."""
        g = torch.Generator().manual_seed(seed)
        return torch.randn(*(shape or (3, 5)), WIDTH, generator=g).to(self.dtype)

    def attach(self, model: nn.Module, name: str = "default", **changes: Any) -> Adapter:
        """Attach with calibration data where the method wants it."""
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        data = self.data(dtype) if self.variant.needs_data else None
        return attach(model, self.cfg(**changes), data, name=name)

    def fresh(self, **changes: Any) -> Toy:
        """The toy with a fresh adapter."""
        model = self.model()
        self.attach(model, **changes)
        return model

    def random(self, *names: str, scale: float = 0.2, **changes: Any) -> Toy:
        """The toy with adapters (one called `default` unless named) whose trained tensors hold random values."""
        model = self.model()
        for i, name in enumerate(names or ("default",)):
            self.attach(model, name, **changes)
            randomise(model, name, seed=10 + i, scale=scale)
        return model

    @contextmanager
    def patched(self, member: str, function: Callable[..., Any] | None) -> Iterator[None]:
        """Replace a member of the variant for a while."""
        own = vars(self.variant).get(member, _missing := object())
        setattr(self.variant, member, staticmethod(function) if function is not None else None)
        try:
            yield
        finally:
            if own is _missing:
                delattr(self.variant, member)
            else:
                setattr(self.variant, member, own)


@dataclass
class _Raises:
    case: Case
    what: str
    words: tuple[str, ...]

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: Any) -> bool:
        self.case.expect(error is not None, f"{self.what} raised nothing.")
        if not isinstance(error, LoraLiteError):
            self.case.expect(not isinstance(error, Exception), f"{self.what} raised {type(error).__name__}: {error}")
            return False
        missing = [w for w in self.words if w not in str(error)]
        self.case.expect(not missing, f"{self.what}: the error does not mention {missing}: {error}")
        return True


@torch.no_grad()
def randomise(model: nn.Module, name: str = "default", seed: int = 10, scale: float = 0.2) -> None:
    """Add normal values of standard deviation `scale` to every trained tensor of one adapter."""
    g = torch.Generator().manual_seed(seed)
    for target, short, _, t in owned_tensors(model, record_of(model, name)):
        if target.specs[short].is_trained:
            t.add_((scale * torch.randn(t.shape, generator=g, dtype=torch.float32)).to(t))


def train(case: Case, model: Toy, steps: int = 1, lr: float = 1e-2, name: str = "default") -> list[float]:
    """A few steps of AdamW on one batch, with the same noise at every call; the method's schedule runs. Returns the
    losses."""
    from ..runtime.handle import adapters

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return _train(case, model, adapters(model)[name], steps, lr)


def _train(case: Case, model: Toy, handle: Adapter, steps: int, lr: float) -> list[float]:
    optimizer = torch.optim.AdamW(handle.param_groups(lr=lr), eps=1e-12)
    if case.variant.on_step is not None:
        schedule(model, optimizer, max(steps, 1))
    batch = batches(case.dtype, 1)[0]
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output, without gradients."""
    return model(x)
