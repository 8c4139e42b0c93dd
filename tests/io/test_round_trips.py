"""Every method with patterns of rank and alpha on odd shapes: our file gives the same bits, PEFT's layout the same
function, and what it cannot hold is refused."""

from __future__ import annotations

import warnings

import pytest
import torch

import lora_lite as ll
from lora_lite import testing
from lora_lite.testing.case import randomise, run
from samples import OPTIONS


def patterned(variant):
    """A case whose first target has another rank, and another alpha, where the method knows such fields."""
    case = testing.Case(variant, options=OPTIONS.get(variant.name, {}))
    paths = [t.path for t in ll.plan(case.model(), case.cfg()).targets]
    r = case.cfg().r
    fields = {
        "rank_pattern": {paths[0]: r - 1} if r > 1 and "r" not in variant.ignores else {},
        "alpha_pattern": {paths[-1]: 11.0} if "alpha" not in variant.ignores else {},
    }
    for names in (("rank_pattern", "alpha_pattern"), ("alpha_pattern",), ()):
        changes = {name: fields[name] for name in names}
        try:
            model = case.model()
            case.attach(model, **changes)
        except (ll.LoraLiteError, AssertionError):  # a size that it does not take
            continue
        return case, model
    raise AssertionError(variant.name)


@pytest.mark.parametrize("variant", ll.variants(), ids=lambda v: v.name)
def test_there_and_back(variant, tmp_path):
    case, model = patterned(variant)
    randomise(model)
    want = run(model, case.x())
    ll.save(model, tmp_path / "a.safetensors")
    fresh = case.model()
    ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(run(fresh, case.x()), want)
    configs = [{t.path: t.cfg for t in testing.case.record_of(m).targets.values()} for m in (model, fresh)]
    assert configs[0] == configs[1]
    try:
        ll.export(model, tmp_path / "peft")
    except ll.StateError as e:
        assert "cannot be written exactly in this layout" in str(e)
        return
    again = case.model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ll.LoraLiteWarning)
        ll.load(again, tmp_path / "peft")
    assert (run(again, case.x()) - want).abs().max() <= 1e-5 * want.abs().max()
