"""Bytes on many GPUs: what is stated on paper is what processes of a run hold and send."""

from __future__ import annotations

import json

import pytest
import torch

import lora_lite as ll
import tiny_llm
from interop.processes import printed
from lora_lite.cost import spread as paper
from lora_lite.testing.toy import toy


def run(ranks: int, *words: object) -> dict[str, float]:
    return json.loads(printed("wire_worker.py", ranks, *words).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "dtype", "ranks", "shards"),
    [
        ("lora", "float32", 2, 2),
        ("lora", "bfloat16", 2, 2),
        ("pissa", "float32", 2, 2),
        ("dora", "bfloat16", 3, 3),
        ("lora", "bfloat16", 4, 2),
    ],
)
def test_fsdp2_holds_and_sends_what_is_stated(method, dtype, ranks, shards):
    found = run(ranks, "fsdp2", method, dtype, shards)
    model = tiny_llm.model().to(getattr(torch, dtype))
    parts = paper.parts_of(model, ll.get_variant(method).config(variant=method, r=3))
    stated = paper.spread_of(parts, ranks, shards=shards)
    assert found["sent"] == stated.sent
    for name in ("weights", "adapter", "states"):
        assert found[name] == getattr(stated, name), name
    # gathered ahead of time on a GPU only: no next block here, and no padding once it is whole
    whole = {b: sum(p.gathered(1) for p in parts if p.block in ("", b)) for b in {p.block for p in parts} - {""}}
    assert found["gathered"] == max(whole.values()) <= stated.gathered


@pytest.mark.slow
def test_tensor_parallel_lora_sends_what_is_stated():
    found = run(2, "tensor")
    model = toy(bias=False)
    stated = paper.tensor_parallel(model, ll.LoRAConfig(r=3, alpha=7, layers=(0,)), 2, tokens=18)
    assert found["base"] == stated.base_sent / 2  # the toy has two blocks, and one was run
    assert found["adapter"] == stated.adapter_sent


def test_by_hand():
    """Two tensors in a block, one outside, over four processes."""
    parts = [
        paper.Part("b", (10, 3), 2, trained=False, adapter=False),
        paper.Part("b", (3, 5), 4, trained=True, adapter=True),
        paper.Part("", (8, 3), 2, trained=False, adapter=False),
    ]
    four = paper.spread_of(parts, 4)
    assert (four.weights, four.adapter) == (3 * 3 * 2 + 2 * 3 * 2, 1 * 5 * 4)
    assert four.states == 5 * (4 + 8)
    assert four.gathered == 4 * 3 * 3 * 2 + 4 * 5 * 4 + 8 * 3 * 2
    assert four.sent_weights == (2 * 72 + 48) * 3 // 4
    assert (four.sent_adapter, four.sent_gradients) == (2 * 80 * 3 // 4, 80 * 3 // 4)
    two = paper.spread_of(parts, 4, shards=2)  # three rows in two shards: four, and averaged between two copies
    assert two.sent_gradients == 80 // 2 + 2 * (2 * 5 * 4) // 2
    alone = paper.spread_of(parts, 4, "ddp")
    assert (alone.weights, alone.gathered, alone.sent) == (60 + 48, 0, 2 * 60 * 3 // 4)


def test_one_gpu_sends_nothing():
    one = paper.spread(toy(), ll.LoRAConfig(r=3), 1)
    assert one.sent == one.gathered == 0
    assert one.adapter == ll.plan(toy(), ll.LoRAConfig(r=3)).bytes


@pytest.mark.parametrize(("gpus", "shards"), [(0, 0), (4, 3), (-8, 8)])
def test_what_cannot_be_cut_is_refused(gpus, shards):
    with pytest.raises(ll.ConfigError, match="multiple of shards"):
        paper.spread(toy(), ll.LoRAConfig(r=3), gpus, shards=shards)


def test_tensor_parallelism_is_counted_for_lora_alone():
    with pytest.raises(ll.ConfigError, match="counted for lora"):
        paper.tensor_parallel(toy(), ll.DoRAConfig(r=3), 2, 8)
