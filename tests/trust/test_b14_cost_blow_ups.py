"""B14. Costs that explode: what a forward keeps for backward, the largest tensor it makes, and the time of a start."""

from __future__ import annotations

import time
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora_lite as ll
from methods import every_method

D = 64


class Wide(nn.Module):
    """Four square layers whose inputs are far smaller than their weights."""

    def __init__(self, d: int = D, n: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(d, d), nn.Tanh()) for _ in range(n))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


DENSE = {"fourierft", "glora", "hira", "kradapter", "miss_bat", "randlora", "shira", "vblora", "waveft", "whole"}
"""Methods with tensors as large as a weight by nature: a spectrum, entries one by one, bases, a bank of vectors, blocks
of the weight that are multiplied."""


def adapted(case, d: int = D):
    torch.manual_seed(0)
    model = Wide(d)
    ll.attach(
        model,
        case.variant.config(**{"variant": case.variant.name, "r": 4, **case.options, "target_kinds": ("linear",)}),
    )
    return model.train()


def fits(case) -> bool:
    if case.variant.needs_data or not case.linear or not case.variant.trains:
        return False
    try:
        adapted(case)
    except ll.ConfigError:
        return False
    return True


def kept(model, x) -> int:
    """Bytes that autograd keeps of one forward, every storage once, parameters apart."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.requires_grad
    return sum(found.values())


@every_method(fits)
def test_what_is_kept_for_backward_is_a_small_multiple_of_lora(case):
    """At most three times what LoRA keeps, on a batch of as many tokens as the layers are wide."""
    x = torch.randn(4, D // 4, D)
    lora = kept(adapted(ll.testing.Case(ll.get_variant("lora"))), x)
    assert kept(adapted(case), x) <= 3 * lora


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:  # a view makes nothing
                self.numel = max(self.numel, t.numel())
        return out


@every_method(fits)
def test_no_dense_update_in_a_training_step(case):
    """Two tokens through layers of 64 x 64: nothing of the size of a weight is made, forward or backward, but for the
    methods that are named here."""
    model = adapted(case)
    with Largest() as made:
        model(torch.randn(1, 2, D)).square().sum().backward()
    assert (made.numel >= D * D) == (case.variant.name in DENSE)


@pytest.mark.slow
@every_method()
def test_a_start_takes_seconds_on_a_large_layer(case):
    """One layer 2048 x 2048: 20 s of a processor at most, decompositions included (an exact SVD takes longer)."""
    torch.manual_seed(0)
    if case.variant.needs_data or not case.linear:
        pytest.skip("its start is calls of the model")
    model = nn.Sequential(nn.Linear(2048, 2048))
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ll.LoraLiteWarning)
            ll.attach(model, case.variant.config(variant=case.variant.name, target_kinds=("linear",)))
    except ll.ConfigError as e:
        pytest.skip(f"does not take this size: {e}")
    assert time.process_time() - start < 20
