"""B6. A hollow save: what is sharded, compiled or wrapped writes the plain model's keys and all of its numbers."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.io.native import read
from lora_lite.runtime.model.site import owned_tensors, place
from lora_lite.runtime.model.state import record_of
from methods import OF_EACH_KIND, every_method


class DistributedDataParallel(nn.Module):
    """The name is what is looked at: the real one needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@every_method(quick=OF_EACH_KIND)
def test_wrapped_and_compiled_models_write_the_plain_file(case, tmp_path):
    model = case.random()
    plain = ll.save(model, tmp_path / "plain").read_bytes()
    for i, wrap in enumerate(
        (torch.compile, DistributedDataParallel, lambda m: torch.compile(DistributedDataParallel(m)))
    ):
        path = ll.save(wrap(model), tmp_path / str(i))
        assert path.read_bytes() == plain
        assert not [k for k in read(path)[1] if "_orig_mod" in k or k.startswith("module.")]


@every_method(quick=("lora", "dora", "ia3", "loreft", "caa"))
def test_an_empty_or_missing_tensor_is_not_saved(case, tmp_path):
    """As ZeRO-3 leaves parameters whose owner is another process."""
    for damage in ("empty", "gone"):
        model = case.random()
        target, short = next((t, short) for t, short, _, _ in owned_tensors(model, record_of(model)))
        path, attribute = place(target, short, "default")
        layer = model.get_submodule(path)
        store = next(table for table in (layer._parameters, layer._buffers) if attribute in table)
        if damage == "empty":
            store[attribute].data = store[attribute].data.new_empty(0)
        else:
            del store[attribute]
        with pytest.raises(ll.LoraLiteError, match=rf"{re.escape(target.path)}|{re.escape(attribute)}"):
            ll.save(model, tmp_path / "never")
        assert not list(tmp_path.iterdir())


RANK = """
import sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
import lora_lite as ll
from lora_lite.testing.toy import toy

rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
model = toy()
handle = ll.attach(model, ll.LoRAConfig(r=4, alpha=7))
for layer in model.layers:
    fully_shard(layer)
fully_shard(model)
with torch.no_grad():
    for p in handle.parameters():
        assert isinstance(p, DTensor)
        p.to_local().fill_(rank + 1.0)  # a value that only this rank knows
ll.save(model, f"{folder}/{rank}")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_every_rank_fills_its_shard(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    running = [
        subprocess.Popen([sys.executable, "-c", RANK, str(r), port, str(tmp_path)], stderr=subprocess.PIPE, env=env)
        for r in (0, 1)
    ]
    try:
        told = [process.communicate(timeout=180)[1] for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert [p.returncode for p in running] == [0, 0], told
    tensors = read(Path(tmp_path) / "0.safetensors")[1]
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    for key, t in tensors.items():
        half = len(t) - len(t) // 2
        assert t[:half].eq(1).all() and t[half:].eq(2).all(), f"{key}: a rank's part is missing"
