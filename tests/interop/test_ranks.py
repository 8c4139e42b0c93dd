"""Two gloo processes under torchrun learn what one process learns, and a run goes on with another number of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_llm
from interop.processes import printed
from measured import record
from neighbours import needs

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

CLOSE = 2e-7
"""Of tensors near 1 that plain gradient descent moves by 0.1: two units in their last place; measured 9e-8."""


def run(ranks: int, *words: object) -> str:
    """What the processes print."""
    return printed("ranks_worker.py", ranks, *words)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter.safetensors")


def apart(a: Path, b: Path) -> float:
    """The largest difference between what two runs have learned."""
    want, got = tensors(a), tensors(b)
    assert want.keys() == got.keys()
    assert max(float(t.abs().max()) for k, t in want.items() if "lora_B" in k) > 5e-2  # which began at 0
    return max(float((got[key] - want[key]).abs().max()) for key in want)


def test_data_parallel_and_another_number_of_ranks(tmp_path):
    run(1, "plain", tmp_path / "one", 4)
    run(2, "plain", tmp_path / "two", 4)
    record("torch", "DDP, two processes, four steps", apart(tmp_path / "one", tmp_path / "two"), CLOSE)
    run(2, "plain", tmp_path / "first", 2)
    run(1, "plain", tmp_path / "then", 4, tmp_path / "first" / "checkpoint-2")
    difference = apart(tmp_path / "one", tmp_path / "then")
    record("torch", "DDP, two steps on two processes and two on one", difference, CLOSE)


@needs("torch", "2.7", "FSDP2 on a CPU")
def test_fsdp2(tmp_path):
    run(1, "fsdp2", tmp_path / "one", 3)
    run(2, "fsdp2", tmp_path / "two", 3)
    record("torch", "FSDP2, two processes, three steps", apart(tmp_path / "one", tmp_path / "two"), CLOSE)
    run(1, "fsdp2", tmp_path / "on", 1, tmp_path / "two" / "adapter.safetensors")
    run(2, "fsdp2", tmp_path / "on2", 1, tmp_path / "one" / "adapter.safetensors")
    difference = apart(tmp_path / "on", tmp_path / "on2")
    record("torch", "FSDP2, one more step on one process and on two", difference, CLOSE)


@needs("torch", "2.7", "FSDP2 on a CPU")
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_sharded_adapter_is_exported_whole(method, tmp_path):
    """In a type that asks for the base's weights too; PEFT's layout gives what the file of ours gives."""
    import lora_lite as ll
    import tiny_llm

    run(2, "fsdp2", tmp_path, 2, *(["-", "dora"] if method == "dora" else []))
    ids = torch.arange(4, 24).view(2, 10)
    found = []
    for place in (tmp_path / "adapter.safetensors", tmp_path / "peft"):
        model = tiny_llm.model().eval()
        ll.load(model, place)
        found.append(model(ids).logits.detach())
    assert (found[0] - tiny_llm.model().eval()(ids).logits).abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], atol=2e-6, rtol=0)


@pytest.mark.optional_backend("deepspeed")
def test_zero_3(tmp_path):
    pytest.importorskip("deepspeed")
    run(1, "plain", tmp_path / "one", 4)
    run(2, "zero3", tmp_path / "two", 4)
    record("deepspeed", "ZeRO-3, two processes, four steps", apart(tmp_path / "one", tmp_path / "two"), CLOSE)
    folder = tmp_path / "two" / "checkpoint-4"
    names = {p.name for p in folder.iterdir()}
    assert "adapter.safetensors" in names and not any(n.startswith("model") for n in names)
    for path in (folder / "global_step4").glob("*model_states.pt"):
        assert not torch.load(path, weights_only=False)["frozen_param_fragments"], "the base lies in the checkpoint"
    run(2, "zero3", tmp_path / "then", 4, tmp_path / "two" / "checkpoint-2")
    difference = apart(tmp_path / "two", tmp_path / "then")
    record("deepspeed", "ZeRO-3, resumed half way", difference, CLOSE)


@needs("transformers", "5.0", "tensor parallelism on a CPU")
def test_tensor_parallelism_is_refused_at_attach(tmp_path):
    said = run(2, "tensor", tiny_llm.save(tmp_path / "base"), 0)
    assert said.count("the model is tensor-parallel") == 2 and "FSDP2" in said
