"""S3. Any value at any place of a file's config: an adapter that works, or one class of error, at once."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings

import pytest
from safetensors.torch import save_file

import lora_lite as ll
from lora_lite.io.native import read
from lora_lite.testing.case import run
from lora_lite.testing.toy import Snapshot
from methods import OF_EACH_KIND, every_method

JUNK = [
    None, True, -1, 0, 10**9, 10**30, 0.5, float("nan"), float("inf"), -float("inf"), 1e308, "", "load", "x" * 10_000,
    [], [1], ["("], [[]], {}, {"a": 1}, {"(": 2}, {"up": None},
]  # fmt: skip
MORE = {"variant": ["os.system", "__class__", "torch.load"], "dtype": ["load", "Tensor", "__dict__", "int64"]}


@every_method(quick=OF_EACH_KIND)
def test_a_config_of_strangers_is_plain_data(case):
    """Every field of every method: it takes the value or says why not, and never builds anything."""
    good = case.cfg().to_dict()
    for field in dataclasses.fields(case.variant.config):
        for value in [*JUNK, *MORE.get(field.name, [])]:
            try:
                cfg = case.variant.config.from_dict({**good, field.name: value})
            except ll.LoraLiteError:
                continue
            json.dumps(cfg.to_dict(), allow_nan=False)  # and what it takes goes into a file again


@every_method(quick=("lora",))
def test_a_file_with_such_a_config(case, tmp_path):
    head, tensors = read(ll.save(case.random(), tmp_path / "x"))
    x, model = case.x(), case.model()
    before = Snapshot(model)
    for field in head["config"]:
        for value in [*JUNK, *MORE.get(field, [])]:
            new = {**head, "config": {**head["config"], field: value}}
            save_file(tensors, str(tmp_path / "evil.safetensors"), {"lora_lite": json.dumps(new)})
            start = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ll.LoraLiteWarning)
                try:
                    ll.load(model, tmp_path / "evil.safetensors")
                except ll.LoraLiteError:
                    pass
                else:
                    assert run(model, x).isfinite().all(), f"{field} = {value!r}"
                    ll.detach(model)
            assert time.process_time() - start < 1, f"{field} = {value!r}"
            assert not (d := before.difference(model)), f"{field} = {value!r}: {d}"


@pytest.mark.parametrize("r", [10**6, 10**9])
def test_a_rank_of_the_file_allocates_nothing(r, tmp_path):
    import resource

    case = ll.testing.Case(ll.get_variant("lora"))
    head, tensors = read(ll.save(case.random(), tmp_path / "x"))
    new = {**head, "config": {**head["config"], "r": r, "rank_pattern": {}}}
    save_file(tensors, str(tmp_path / "evil.safetensors"), {"lora_lite": json.dumps(new)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ll.LoraLiteError):
        ll.load(case.model(), tmp_path / "evil.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000  # kB; such an A alone has 48,000
