"""What a method can do and where: each ability is tried, and either works, with the error measured, or is refused with
a sentence."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.errors import LoraLiteError
from ..core.registry import get_variant
from ..core.variant import Variant
from ..io.export import export
from ..io.load import load
from ..io.native import adapter_state_dict, load_adapter_state_dict
from ..runtime.attach import attach
from ..runtime.combine import combine
from ..runtime.handle import adapters
from ..runtime.merge import merge, unmerge
from ..runtime.select import activate, active, rows
from .case import SIZES, Case, randomise, run
from .checks.suite import CHECKS, relative
from .toy import HIDDEN, VOCABULARY, WIDTH, FakeQuantLinear

Ability = Callable[[Case], float]
ABILITIES: dict[str, Ability] = {}
"""Name -> function that returns the relative error it measured; a `LoraLiteError` is a refusal, anything else a
defect."""
ABOUT: dict[str, str] = {}
"""Name -> what it means, in a sentence."""
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Outcome:
    """One ability of one method."""

    works: bool
    """False where it is refused."""
    error: float = 0.0
    """Largest difference over the largest output, where it works."""
    refusal: str = ""
    """The sentence of the refusal, where it does not."""


def ability(name: str) -> Callable[[Ability], Ability]:
    """Enter an ability; the first line of its docstring says what it means."""

    def enter(function: Ability) -> Ability:
        ABILITIES[name] = function
        ABOUT[name] = " ".join((function.__doc__ or "").split())
        return function

    return enter


def outcome(variant: str | type[Variant], name: str) -> Outcome:
    """Try one ability of one method.

    Raises:
        AssertionError: it does not raise, and does not work either.
    """
    case = Case(get_variant(variant) if isinstance(variant, str) else variant)
    try:
        error = ABILITIES[name](case)
    except LoraLiteError as e:
        return Outcome(False, refusal=str(e).splitlines()[0])
    case.expect(error <= TOLERANCE, f"{name}: differs by {error:.1e}.")
    return Outcome(True, error)


def what_works(variant: str | type[Variant]) -> dict[str, Outcome]:
    """Every ability of one method, yours too: `ll.testing.what_works("myvariant")`."""
    return {name: outcome(variant, name) for name in ABILITIES}


# ---- helpers


def put(case: Case, model: nn.Module, name: str = "default", seed: int = 10, **changes: Any) -> None:
    """Attach with random values, at the first size that the method takes; a refusal is that of the first size."""
    first: LoraLiteError | None = None
    data = case.data(case.dtype) if case.variant.needs_data else None
    for r, alpha in SIZES:
        try:
            cfg = case.variant.config(
                **{"variant": case.variant.name, "r": r, "alpha": alpha, **case.options, **changes}
            )
            attach(model, cfg, data, name=name)
        except LoraLiteError as e:
            first = first or e
        else:
            randomise(model, name, seed)
            return
    assert first is not None
    raise first


def merged(model: nn.Module, *inputs: Tensor) -> float:
    """How far the merged model is from the adapted one; the bits must come back."""
    with torch.no_grad():
        want = model(*inputs)
        with active(model, None):
            assert not torch.equal(model(*inputs), want), "the adapter changes nothing"
        merge(model)
        got = model(*inputs)
        unmerge(model)
        assert torch.equal(model(*inputs), want), "unmerge does not give the bits back"
    return relative(got, want)


class Experts(nn.Module):
    """Two projections of three experts in fused parameters; every token goes to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = 3, False
        self.up_proj = nn.Parameter(torch.randn(3, HIDDEN, WIDTH) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(3, WIDTH, HIDDEN) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        which = torch.arange(len(x)) % 3
        out = torch.zeros_like(x)
        for e in range(3):
            h = F.linear(x[which == e], self.up_proj[e]).tanh()
            out[which == e] = F.linear(h, self.down_proj[e])
        return out


class Places(nn.Module):
    """A token embedding, a norm, a convolution and experts, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, dilation=2)
        self.experts = Experts()

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.embed(ids))
        h = h + self.conv(h.mT).mT
        return h + self.experts(h.flatten(0, 1)).view_as(h)


def placed(case: Case, kind: str) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Places().eval()
        nn.init.normal_(model.norm.weight)
        nn.init.normal_(model.norm.bias)
    put(case, model, target_kinds=(kind,))
    return merged(model, torch.arange(15).view(3, 5))


# ---- the abilities


@ability("merge")
def _(case: Case) -> float:
    """`ll.merge` writes the adapter into dense weights, and `ll.unmerge` gives the bits back."""
    return merged(case.random(), case.x())


@ability("merge 4/8 bit")
def _(case: Case) -> float:
    """`ll.merge(dequantize=True)` replaces weight-only quantised layers by dense ones; the adapter may have needed
    `dequantize=True` too."""
    model = case.model(kind=FakeQuantLinear)
    put(case, model, dequantize=True)
    x = case.x()
    want = run(model, x)
    merge(model, dequantize=True)
    got = run(model, x)
    unmerge(model)
    assert torch.equal(run(model, x), want)
    return relative(got, want)


def _quantised(case: Case, **changes: Any) -> float:
    model = case.model(kind=FakeQuantLinear)
    put(case, model, **changes)
    twin = case.model()
    with torch.no_grad():
        for path, layer in model.named_modules():
            if isinstance(layer, FakeQuantLinear):
                own: Any = twin.get_submodule(path)
                own.weight.copy_(layer.dequantised())
                own.bias.copy_(layer.bias)
    put(case, twin)
    load_adapter_state_dict(twin, "default", adapter_state_dict(model, "default"))
    return relative(run(model, case.x()), run(twin, case.x()))


@ability("4/8 bit base")
def _(case: Case) -> float:
    """Stands on weight-only quantised layers without reading their weight, and equals the same adapter on the
    dequantised ones."""
    return _quantised(case)


@ability("dequantize=True")
def _(case: Case) -> float:
    """Stands on weight-only quantised layers where the config allows reading the weight."""
    return _quantised(case, dequantize=True)


@ability("rows")
def _(case: Case) -> float:
    """Several adapters in one batch (`ll.rows`); rows without one keep the base's bits."""
    model = case.random("a", "b")
    x, names = case.x(4, 5), ["b", None, "a", "b"]
    alone = {}
    for name in ("a", "b", None):
        with active(model, name):
            alone[name] = run(model, x)
    with rows(model, names):
        mixed = run(model, x)
    assert torch.equal(mixed[1], alone[None][1])
    return max(relative(mixed[i], alone[name][i]) for i, name in enumerate(names))


@ability("several")
def _(case: Case) -> float:
    """Several adapters of the method active at once, with weights, merged as one."""
    model = case.random("a", "b")
    activate(model, {"a": 0.5, "b": -1.0})
    return merged(model, case.x())


@ability("embedding")
def _(case: Case) -> float:
    """Stands on `nn.Embedding` (`target_kinds=("embedding",)`)."""
    return placed(case, "embedding")


@ability("conv")
def _(case: Case) -> float:
    """Stands on convolutions (`target_kinds=("conv",)`)."""
    return placed(case, "conv")


@ability("norm")
def _(case: Case) -> float:
    """Stands on norms (`target_kinds=("norm",)`)."""
    return placed(case, "norm")


@ability("experts")
def _(case: Case) -> float:
    """Stands on fused experts (`target_kinds=("experts",)`)."""
    return placed(case, "experts")


@ability("checkpointing")
def _(case: Case) -> float:
    """Gradients under gradient checkpointing equal those without it."""
    grads = []
    for checkpointing in (False, True):
        model = case.random()
        model.gradient_checkpointing = checkpointing
        handle = adapters(model)["default"]
        parameters = list(handle.parameters())
        x = case.x().requires_grad_()
        model(x).square().sum().backward()
        grads.append(torch.cat([x.grad.flatten(), *(p.grad.flatten() for p in parameters if p.grad is not None)]))  # type: ignore[union-attr]
    return relative(grads[1], grads[0])


@ability("one graph")
def _(case: Case) -> float:
    """`torch.compile(fullgraph=True)` without a break."""
    CHECKS["traces_in_one_graph"](case)
    return 0.0


@ability("beside a head")
def _(case: Case) -> float:
    """A head trained whole beside it (`train_modules`)."""
    model = case.model()
    put(case, model, train_modules=("head",))
    ids = torch.arange(15).view(3, 5)
    head: Any = model.head
    with torch.no_grad():
        want = model(input_ids=ids) @ (head.weight + head.lora_W).mT
        return relative(model(input_ids=ids, labels=ids).logits, want)


@ability("combine")
def _(case: Case) -> float:
    """`ll.combine`: an exact weighted sum of adapters as one new adapter."""
    model = case.random("a", "b")
    activate(model, {"a": 0.5, "b": 0.25})
    want = run(model, case.x())
    combine(model, {"a": 0.5, "b": 0.25}, name="sum")
    activate(model, "sum")
    return relative(run(model, case.x()), want)


@ability("PEFT")
def _(case: Case) -> float:
    """`ll.export` writes PEFT's layout, which `ll.load` and PEFT read back as the same function."""
    model = case.random()
    with tempfile.TemporaryDirectory() as folder:
        export(model, folder, format="peft")
        other = case.model()
        load(other, folder)
    return relative(run(other, case.x()), run(model, case.x()))


@ability("reference")
def _(case: Case) -> float:
    """`ll.attach(reference_weights=...)`: starts from what the base lost against a full-precision checkpoint."""
    model, full = case.model(), case.model()
    with torch.no_grad():
        for layer in full.layers:
            up: Any = layer.up
            up.weight.add_(0.02 * torch.outer(torch.linspace(-1, 1, HIDDEN), torch.linspace(1, -1, WIDTH)))
    with tempfile.TemporaryDirectory() as folder:
        save_file({k: v.contiguous() for k, v in full.state_dict().items()}, Path(folder) / "full.safetensors")
        attach(model, case.cfg(), case.data(case.dtype) if case.variant.needs_data else None, reference_weights=folder)
    return relative(run(model, case.x()), run(full, case.x()))
