"""What the n-th adapter costs does not depend on n, and what comes and goes leaves nothing behind. Work is counted in
calls of functions, which a busy machine does not change."""

from __future__ import annotations

import gc
import sys
import tracemalloc
import weakref

import pytest
import torch
from torch import nn

import lora_lite as ll


class Stack(nn.Module):
    def __init__(self, blocks: int = 2, d: int = 12):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up_proj": nn.Linear(d, 2 * d), "down_proj": nn.Linear(2 * d, d)}) for _ in range(blocks)
        )

    def forward(self, x):
        for block in self.layers:
            x = x + block["down_proj"](block["up_proj"](x).relu())
        return x


def calls(run) -> int:
    """How many functions, Python's and C's, a call calls."""
    n = 0

    def count(frame, event, arg):
        nonlocal n
        n += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return n


def lora(**more):
    return ll.LoRAConfig(r=2, alpha=3, **more)


CONFIGS = {
    "lora": lora,
    "pissa": lambda: ll.PiSSAConfig(r=2, alpha=3),
    "oft": lambda: ll.OFTConfig(),
    "hira": lambda: ll.HiRAConfig(r=2),
    "vera": lambda: ll.VeRAConfig(r=2),
    "loreft": lambda: ll.LoReFTConfig(r=2, positions="all"),
}


def filled_to(model: nn.Module, n: int, cfg) -> None:
    for i in range(len(ll.adapters(model)), n):
        ll.attach(model, cfg(), name=f"filler{i:04}")


def works(model, cfg, path) -> dict[str, int]:
    """Calls of each verb for one more adapter, which is gone afterwards."""
    x = torch.randn(2, 3, 12)
    found = {"attach": calls(lambda: ll.attach(model, cfg(), name="one"))}
    found["load"] = calls(lambda: ll.load(model, path, name="two"))
    found["activate"] = calls(lambda: ll.activate(model, "one"))
    with torch.no_grad():
        found["forward"] = calls(lambda: model(x))
        with ll.rows(model, ["one", "two"]):
            model(x)
            found["rows"] = calls(lambda: model(x))
    found["state"] = calls(lambda: ll.adapter_state_dict(model, "one"))
    found["plan"] = calls(lambda: ll.plan(model, cfg()))
    found["detach"] = calls(lambda: ll.detach(model, "one"))
    ll.detach(model, "two")
    return found


@pytest.mark.parametrize("name", [n if n == "lora" else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
def test_the_work_of_one_more_adapter_does_not_depend_on_how_many_there_are(name, tmp_path):
    cfg, model = CONFIGS[name], Stack()
    ll.attach(model, cfg())
    path = ll.save(model, tmp_path / "a.safetensors")
    filled_to(model, 10, cfg)
    works(model, cfg, path)  # what is remembered once and for all
    few = works(model, cfg, path)
    filled_to(model, 100, cfg)
    many = works(model, cfg, path)
    for verb, n in few.items():
        assert many[verb] <= 1.05 * n + 5, (verb, few, many)


@pytest.mark.slow
def test_the_five_hundredth_attach_works_as_the_tenth():
    model = Stack()
    filled_to(model, 9, lora)
    tenth = calls(lambda: ll.attach(model, lora(), name="tenth"))
    filled_to(model, 499, lora)
    assert calls(lambda: ll.attach(model, lora(), name="last")) <= 1.05 * tenth


def test_adapters_of_one_kind_share_what_is_equal():
    model = Stack()
    for name in "ab":
        ll.attach(model, lora(), name=name)
    a, b = (ll.adapters(model)[name].record.targets for name in "ab")
    for path, target in a.items():
        assert target is not b[path]
        assert target.cfg is b[path].cfg and target.specs is b[path].specs and target.base is b[path].base
    ll.attach(model, ll.LoRAConfig(r=3, alpha=3), name="c")
    c = ll.adapters(model)["c"].record.targets
    assert all(t.cfg.r == 3 and t.specs["lora_A"].shape[0] == 3 for t in c.values())
    assert all(t.cfg.r == 2 for t in a.values())
    with torch.no_grad():
        model.layers[0]["up_proj"].weight.add_(1)
    ll.attach(model, lora(), name="d")
    assert ll.adapters(model)["d"].record.targets["layers.0.up_proj"].base != a["layers.0.up_proj"].base


def kept_by(cycle, n: int) -> tuple[int, int]:
    """Bytes and objects that n more rounds leave behind, after some rounds that fill what is kept once."""
    tracemalloc.start()
    try:
        for _ in range(12):
            cycle()
        gc.collect()
        bytes_before, objects_before = tracemalloc.get_traced_memory()[0], len(gc.get_objects())
        for _ in range(n):
            cycle()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - bytes_before, len(gc.get_objects()) - objects_before
    finally:
        tracemalloc.stop()


LEFT = 2000
"""Bytes of one round that Python's own caches, of names and small objects, may hold; what an adapter has on one
layer is more. Objects may not become more at all, but for a bounded few."""
ROUNDS = [pytest.param(40), pytest.param(200, marks=pytest.mark.slow)]


def assert_flat(cycle, n: int) -> None:
    left = kept_by(cycle, n)
    assert left[0] < LEFT * n and left[1] < 60, left


@pytest.mark.parametrize("n", ROUNDS)
def test_attached_and_detached_again_and_again_leaves_nothing(n):
    model, gone, number = Stack(1), [], iter(range(10**6))
    ll.attach(model, lora(), name="stays")

    def cycle():
        name = f"a{next(number):06}"  # a new name each time, as requests bring them
        ll.attach(model, lora(), name=name)
        gone.append(weakref.ref(model.layers[0]["up_proj"]._parameters[f"lora_A@{name}"]))
        model(torch.randn(2, 12))
        ll.detach(model, name)

    cycle()
    gc.collect()
    assert all(ref() is None for ref in gone)
    gone.clear()
    assert_flat(lambda: (cycle(), gone.clear()), n)


@pytest.mark.parametrize("n", ROUNDS)
def test_loaded_and_detached_again_and_again_leaves_nothing(n, tmp_path):
    model, number = Stack(1), iter(range(10**6))
    ll.attach(model, lora())
    path = ll.save(model, tmp_path / "a.safetensors")
    tensors = []

    def cycle():
        name = f"a{next(number):06}"
        ll.load(model, path, name=name)
        tensors[:] = [weakref.ref(model.layers[0]["up_proj"]._parameters[f"lora_A@{name}"])]
        with ll.rows(model, [name, "default"]), torch.no_grad():
            model(torch.randn(2, 12))
        ll.detach(model, name)

    assert_flat(cycle, n)
    with torch.no_grad(), ll.rows(model, ["default", None]):
        model(torch.randn(2, 12))
    gc.collect()
    assert tensors[0]() is None, "stacks of rows may keep an adapter until the next mixed call, and no longer"


@pytest.mark.parametrize("n", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_five_switches_a_round_leave_nothing(n):
    model = Stack(1)
    names = [f"a{i}" for i in range(4)]
    for name in names:
        ll.attach(model, lora(), name=name)
    number = iter(range(10**6))

    def cycle():
        for name in names:
            ll.activate(model, name)
        with ll.active(model, {"a0": 0.5, "a1": 0.1 * next(number)}):
            pass

    assert_flat(cycle, n)


@pytest.mark.slow
def test_a_hundred_loads_of_fifty_megabytes_leave_nothing(tmp_path):
    model = nn.Sequential(nn.Linear(3200, 3200))
    ll.attach(model, ll.LoRAConfig(r=2000, alpha=3))  # 51 MB
    path = ll.save(model, tmp_path / "a.safetensors")
    ll.detach(model)
    assert path.stat().st_size > 50e6

    def resident() -> int:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096

    def cycle():
        ll.load(model, path)
        ll.detach(model)

    for _ in range(5):
        cycle()
    before = resident()
    for _ in range(100):
        cycle()
    assert resident() - before < 50e6, "less than one adapter"
