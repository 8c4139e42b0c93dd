"""A thousand adapters on one small model: each found by name, switched to, mixed in batches, and gone without a
trace."""

from __future__ import annotations

import pytest
import torch

import lora_lite as ll
from lora_lite.testing.case import randomise
from lora_lite.testing.toy import Snapshot, toy

CFG = ll.LoRAConfig(r=1, alpha=3)


def x(*shape):
    return torch.randn(*shape, 12, generator=torch.Generator().manual_seed(2))


def alone(seed, inputs):
    model = toy()
    ll.attach(model, CFG)
    randomise(model, seed=seed)
    return model(inputs)


@pytest.mark.parametrize("n", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_many(n, tmp_path):
    model = toy()
    base, before = model(x(3, 5)), Snapshot(model)
    for i in range(n):
        ll.attach(model, CFG, name=f"a{i}")
        randomise(model, f"a{i}", seed=i)
    some = [0, 7, n // 2, n - 1]
    for i in some:
        ll.activate(model, f"a{i}")
        torch.testing.assert_close(model(x(3, 5)), alone(i, x(3, 5)), atol=1e-6, rtol=0)
    rows = [f"a{i}" for i in range(0, n, max(1, n // 64))]
    with torch.no_grad(), ll.rows(model, rows):
        mixed = model(x(len(rows), 5))
    for k, name in list(enumerate(rows))[:: max(1, len(rows) // 5)]:
        torch.testing.assert_close(mixed[k], alone(int(name[1:]), x(len(rows), 5))[k], atol=1e-5, rtol=0)
    ll.save(model, tmp_path / "a.safetensors", name=f"a{n - 1}")
    other = toy()
    ll.load(other, tmp_path / "a.safetensors")
    torch.testing.assert_close(other(x(3, 5)), alone(n - 1, x(3, 5)), atol=1e-6, rtol=0)
    ll.detach(model, "a7")
    with pytest.raises(ll.StateError, match="no adapter is called 'a7'"):
        ll.activate(model, "a7")
    assert len(ll.adapters(model)) == n - 1
    ll.detach(model)
    assert torch.equal(model(x(3, 5)), base)
    assert not before.difference(model)
