"""What only several processes show: FSDP2 on gloo, and that a seed means the same adapter in each of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import lora_lite as ll
from neighbours import needs

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


@needs("torch", "2.7", "FSDP2 on a CPU")
@pytest.mark.parametrize(
    "methods", [["lora", "bank"], pytest.param(["dora", "hra", "pissa", "vera"], marks=pytest.mark.slow)], ids="-".join
)
def test_fsdp2(tmp_path, methods):
    """Attach, shard, train, save, load: as without sharding; what would leave ranks apart raises."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    worker = str(Path(__file__).with_name("fsdp2_worker.py"))
    running = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), port, str(tmp_path), *methods],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENV,
        )
        for rank in (0, 1)
    ]
    try:
        told = [process.communicate(timeout=180) for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    for process, (out, err) in zip(running, told, strict=True):
        assert process.returncode == 0 and out.strip().endswith("OK"), err[-3000:]
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in {n.rsplit("-", 1)[0] for n in files}:
        assert files[f"{name}-0.safetensors"] == files[f"{name}-1.safetensors"], "two ranks saved different adapters"


START = """
import hashlib, sys, torch
torch.manual_seed(int(sys.argv[1])); torch.set_num_threads(1)
import lora_lite as ll
from lora_lite.testing import Case
variants = ll.variants() if sys.argv[1] == "1" else ll.variants()[::-1]
for variant in variants:
    case = Case(variant)
    state = ll.adapter_state_dict(case.fresh())
    digest = hashlib.sha256(b"".join(k.encode() + v.numpy().tobytes() for k, v in sorted(state.items())))
    print(variant.name, digest.hexdigest())
"""


def test_a_seed_means_the_same_adapter_in_every_process():
    found = []
    for seed in ("1", "2"):
        env = {**ENV, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", START, seed], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(dict(line.split() for line in done.stdout.splitlines()))
    assert found[0] == found[1] and set(found[0]) == {
        v.name for v in ll.variants() if v.__module__.startswith("lora_lite.")
    }
