"""S4. A pattern from a file is never run: not one that takes for ever, and not one that matches more."""

from __future__ import annotations

import json
import time

import pytest
from safetensors.torch import save_file

import lora_lite as ll
from lora_lite.io.native import read
from lora_lite.testing.case import run
from methods import every_method

ENDLESS = r"(([a-z.]+)+)+(([0-9.]+)+)+!"
FIELDS = ("target_names", "exclude_names", "rank_pattern", "alpha_pattern", "train_modules")


def test_the_pattern_of_this_test_is_endless():
    import re
    import threading

    thread = threading.Thread(target=re.fullmatch, args=(ENDLESS, "layers.0.self_attn.q" * 1), daemon=True)
    start = time.process_time()
    thread.start()
    thread.join(0.2)
    assert time.process_time() - start > 0.05


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
    fresh, start = case.model(), time.process_time()
    try:
        ll.load(fresh, tmp_path / "slow.safetensors")
    except ll.LoraLiteError:
        pass
    else:
        assert (run(fresh, x) == run(model, x)).all()
    assert time.process_time() - start < 1
