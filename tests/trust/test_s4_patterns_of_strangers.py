"""S4. A pattern from a file is never run: not one that takes for ever, and not one that matches more."""

from __future__ import annotations

import contextlib
import json
import re
import signal

import pytest
from safetensors.torch import save_file

import lora_lite as ll
from lora_lite.io.native import read
from lora_lite.testing.case import run
from methods import every_method

ENDLESS = "(" * 8 + "." + "+)" * 8 + "+!"
FIELDS = ("target_names", "exclude_names", "rank_pattern", "alpha_pattern", "train_modules")


class Late(BaseException):
    """Of no class that the library turns into an error of its own."""


@contextlib.contextmanager
def within(seconds):
    """Whatever takes longer is broken off, so that a red test of this file ends."""

    def late(number, frame):
        raise Late(f"not done in {seconds} s of a processor")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_the_pattern_of_this_test_is_endless():
    with pytest.raises(Late), within(0.1):
        re.fullmatch(ENDLESS, "layers.0.up")


@pytest.mark.parametrize("field", FIELDS)
@every_method(quick=("lora", "ia3"))
def test_a_native_file_with_it_loads_at_once(case, field, tmp_path):
    model, x = case.random(), case.x()
    head, tensors = read(ll.save(model, tmp_path / "x"))
    if field not in head["config"]:
        pytest.skip("this method has no such field")
    value = {ENDLESS: 2} if field.endswith("_pattern") else [ENDLESS]
    head["config"][field] = value
    save_file(tensors, str(tmp_path / "slow.safetensors"), {"lora_lite": json.dumps(head)})
    fresh = case.model()
    with within(1):
        try:
            ll.load(fresh, tmp_path / "slow.safetensors")
        except ll.LoraLiteError:
            pass
        else:
            assert (run(fresh, x) == run(model, x)).all()
