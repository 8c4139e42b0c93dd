"""Runs of several processes on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE.parent), *(p for p in sys.path if p)]),
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
}


def printed(worker: str, ranks: int, *words: object) -> str:
    """What a file of this folder prints with these words, as so many processes under torchrun."""
    start = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [sys.executable, *start, str(HERE / worker), *map(str, words)],
        capture_output=True,
        text=True,
        env=ENV,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
