"""S6. A save that is killed leaves the old file or the new one, whole: at every line of the library's own code."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

import lora_lite as ll
from lora_lite.testing.case import randomise, run
from lora_lite.testing.toy import toy

IO = str(Path(ll.__file__).parent / "io")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX processes")


def lines_of(call, stop: int = 0) -> int:
    """Run, and count the lines of the room `io`; at line `stop` the process is killed as by a power cut."""
    count = 0

    def line(frame, event, arg):
        nonlocal count
        if event == "line":
            count += 1
            if count == stop:
                os.kill(os.getpid(), signal.SIGKILL)
        return line

    before = sys.gettrace()
    sys.settrace(lambda frame, event, arg: line if frame.f_code.co_filename.startswith(IO) else None)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def killed(call, stop: int) -> bool:
    """Whether a copy of this process was killed at that line."""
    child = os.fork()
    if child == 0:
        try:
            lines_of(call, stop)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def adapted(seed):
    model = toy()
    ll.attach(model, ll.LoRAConfig(r=3, alpha=7))
    randomise(model, seed=seed)
    return model


def test_a_save_killed_anywhere(tmp_path):
    assert threading.active_count() == 1 or sys.platform != "darwin"
    old, new, x = adapted(1), adapted(2), ll.testing.Case(ll.get_variant("lora")).x()
    path = ll.save(old, tmp_path / "x")
    ll.save(old, tmp_path / "other")
    total = lines_of(lambda: ll.save(new, tmp_path / "other"))
    want = {"old": run(old, x), "new": run(new, x)}
    found, kills = set(), 0
    for stop in sorted({*range(1, total + 1, max(1, total // 40)), *range(total - 8, total + 1)}):
        path.write_bytes(ll.save(old, tmp_path / "again").read_bytes())
        kills += killed(lambda: ll.save(new, path), stop)
        fresh = toy()
        ll.load(fresh, path)
        y = run(fresh, x)
        which = [name for name, value in want.items() if (y == value).all()]
        assert len(which) == 1, f"killed at line {stop} of {total}: neither the old adapter nor the new one"
        found.add(which[0])
    assert kills >= 30 and found == {"old", "new"}
