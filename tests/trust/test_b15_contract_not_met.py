"""B15. A method that is silently something else: schedules nobody steps, starts that differ, data that breaks off."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch

import lora_lite as ll
from lora_lite.testing.case import run
from lora_lite.testing.toy import Snapshot
from methods import OF_EACH_KIND, every_method


@every_method(lambda case: case.variant.on_step is not None)
def test_a_schedule_that_nobody_steps_raises(case, tmp_path):
    model = case.fresh().train()
    opt = torch.optim.AdamW(ll.adapters(model)["default"].param_groups(lr=1e-2))
    model(case.x()).square().sum().backward()
    opt.step()
    with pytest.raises(ll.StateError, match=r"ll\.schedule"):
        model(case.x())
    with pytest.raises(ll.StateError, match="schedule"):
        ll.save(model, tmp_path / "x")


@every_method()
def test_a_fresh_adapter_is_the_base_or_says_by_how_much(case):
    bound, x = case.variant.identity_bound, case.x()
    base, y = run(case.model(), x), run(case.fresh(), x)
    if bound == 0:
        assert torch.equal(y, base)
    elif math.isfinite(bound):
        assert 0 < float((y - base).abs().max()) <= bound * float(base.abs().max())
    else:
        assert not torch.equal(y, base)


@every_method(lambda case: bool(case.variant.needs_data))
def test_data_that_breaks_off_leaves_nothing(case):
    """The second batch raises, while hooks stand on the model."""
    model = case.model().train()
    before = Snapshot(model, case.x())

    def data():
        yield case.data(case.dtype)[0]
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        ll.attach(model, case.cfg(), data())
    assert not (d := before.difference(model)), d
    case.attach(model)


def digest(case, **changes) -> str:
    state = ll.adapter_state_dict(case.fresh(**changes))
    return hashlib.sha256(b"".join(k.encode() + v.numpy().tobytes() for k, v in sorted(state.items()))).hexdigest()


@every_method(lambda case: case.linear and case.variant.group_init is None, quick=OF_EACH_KIND)
def test_the_order_of_the_patterns_changes_nothing(case):
    names = ("up", "down")
    torch.manual_seed(7)
    one = digest(case, target_names=names)
    torch.manual_seed(8)
    assert digest(case, target_names=names[::-1]) == one


PROCESS = """
import sys, torch
torch.manual_seed(int(sys.argv[1])); torch.set_num_threads(1)
import lora_lite as ll
from methods import OF_EACH_KIND, every_method
from trust_digest import digest
for p in every_method().args[1]:
    print(p.id, digest(p.values[0]))
"""


@pytest.mark.slow
def test_every_process_starts_the_same_adapter():
    """Another seed of the process, another order of hashing, another number of threads."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    code = PROCESS.replace("from trust_digest import digest\n", _source_of_digest())
    found = []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, seed], capture_output=True, text=True, env={**env, "PYTHONHASHSEED": seed}
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(dict(line.split() for line in done.stdout.splitlines()))
    assert found[0] == found[1] and len(found[0]) == len(ll.variants())


def _source_of_digest() -> str:
    import inspect

    return "import hashlib\n" + inspect.getsource(digest)
