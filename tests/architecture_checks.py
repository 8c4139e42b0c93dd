"""What must hold on every architecture: each check takes its name and raises AssertionError with the target's path."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite as ll
from architectures import TABLE, batch, build
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import Snapshot

CHECKS: dict[str, Callable[[str], None]] = {}


def config(name: str) -> ll.LoRAConfig:
    return ll.LoRAConfig(r=2, alpha=5, **TABLE[name].fields)


def check(function: Callable[[str], None]) -> Callable[[str], None]:
    CHECKS[function.__name__] = function
    return function


def tensors(output: Any) -> Iterator[Tensor]:
    """Every floating tensor of an output, caches apart."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, dict):
        for key, value in output.items():
            if key not in ("past_key_values", "cache_params", "state", "loss"):
                yield from tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors(value)


@torch.no_grad()
def run(model: nn.Module, name: str) -> list[Tensor]:
    """All outputs of one call on the architecture's batch. Without torch's fused encoder layer, which it leaves for
    one of hooks or of gradients, and which rounds otherwise on some processors."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(devices=[]):
            return [t.clone() for t in tensors(model(**batch(name)))]
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def gap(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference over the largest entry, output by output."""
    return max(float((s - t).abs().max() / t.abs().max().clamp_min(1e-6)) for s, t in zip(a, b, strict=True))


def adapted(name: str, scale: float = 0.2) -> tuple[nn.Module, ll.Adapter]:
    model = build(name)
    handle = ll.attach(model, config(name))
    randomise(model, scale=scale)
    return model, handle


def conditional(name: str, path: str) -> bool:
    """Whether the table says that the target may do nothing on this batch."""
    return any(re.search(pattern, path) for pattern in TABLE[name].conditional)


@check
def attaches(name: str) -> None:
    """The plan finds targets in every part, and a fresh adapter is the base bit for bit: the frozen one, since torch
    takes other kernels for weights that train."""
    model = build(name).requires_grad_(False)
    base = run(model, name)
    assert base and all(t.isfinite().all() for t in base), "the model itself gives no finite output"
    handle = ll.attach(model, config(name))
    missed = [p for p in TABLE[name].reaches if not any(re.search(rf"(^|\.){p}\.", path) for path in handle.targets)]
    assert handle.targets and not missed, f"no target in {missed}"
    assert same(run(model, name), base), "a fresh adapter changes the output"


@check
def every_target_acts(name: str) -> None:
    """A random adapter on one target alone changes the output."""
    model, handle = adapted(name, scale=0.5)
    values = {p: t.clone() for p, t in model.state_dict().items() if "lora_B" in p}
    factors = {path: model.get_submodule(path).lora_B for path in handle.targets}
    for t in factors.values():
        t.data.zero_()
    base, idle = run(model, name), []
    for path, t in factors.items():
        t.data.copy_(values[f"{path}.lora_B"])
        if same(run(model, name), base) and not conditional(name, path):
            idle.append(path)
        t.data.zero_()
    assert not idle, f"do nothing: {idle}"


@check
def gradients_arrive(name: str) -> None:
    """Every trained tensor gets a finite gradient that is not zero, and no parameter of the base gets any."""
    model, handle = adapted(name)
    g = torch.Generator().manual_seed(4)
    loss = sum((t * torch.randn(t.shape, generator=g)).sum() for t in tensors(model(**batch(name))) if t.requires_grad)
    assert isinstance(loss, Tensor), "no output depends on the adapter"
    loss.backward()
    wrong = [
        f"{path}.{short}"
        for path in handle.targets
        for short, p in model.get_submodule(path).named_parameters(recurse=False)
        if short.startswith("lora_")
        and (p.grad is None or not p.grad.isfinite().all() or not p.grad.any())
        and not conditional(name, path)
    ]
    assert not wrong, f"no gradient, or none that is finite and nonzero: {wrong}"
    ours = {id(p) for p in handle.parameters()}
    assert not [n for n, p in model.named_parameters() if p.grad is not None and id(p) not in ours]


@check
def comes_back_from_a_file(name: str) -> None:
    """Saved and loaded into a fresh model it gives the same bits."""
    model, _ = adapted(name)
    want = run(model, name)
    with tempfile.TemporaryDirectory() as folder:
        path = ll.save(model, Path(folder) / "adapter")
        other = build(name)
        ll.load(other, path)
    assert same(run(other, name), want), f"the reloaded adapter differs by {gap(run(other, name), want):.1e}"
    assert gap(want, run(build(name), name)) > 1e-4, "the adapter does nothing"


@check
def merges(name: str) -> None:
    """Merged, the model does what it did adapted, to 1e-5 of the largest output; unmerged, it is as before."""
    model, _ = adapted(name, scale=0.05)
    want, before = run(model, name), Snapshot(model)
    ll.merge(model)
    error = gap(run(model, name), want)
    assert error <= 1e-5, f"merged and adapted differ by {error:.1e}"
    ll.unmerge(model)
    assert not (d := before.difference(model)), d
    assert same(run(model, name), want)


@check
def detaches(name: str) -> None:
    """Nothing stays behind."""
    model = build(name)
    base = run(model, name)  # models keep sizes and masks of their first call
    before = Snapshot(model)
    ll.attach(model, config(name))
    randomise(model)
    run(model, name)
    ll.detach(model)
    assert not (d := before.difference(model)), d
    assert same(run(model, name), base)
