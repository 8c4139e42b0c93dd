"""B12. Scale or options lost in the file: the effective scale of every target travels, what is unknown is said."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import lora_lite as ll
from lora_lite.io.native import read
from lora_lite.testing.case import randomise, run
from lora_lite.testing.toy import Snapshot
from methods import OF_EACH_KIND, every_method

PATTERNS = {"alpha_pattern": {r"layers\.0\..*": 11.0, r"layers\.1\.up": 0.5}}


@every_method(lambda case: "alpha" not in case.variant.ignores and case.linear)
def test_scales_per_target_survive(case, tmp_path):
    """Twice the scale in one block and a tenth in another: file, header and output agree."""
    model, x = case.random(**PATTERNS), case.x()
    plain = case.random()
    ll.load_adapter_state_dict(plain, None, ll.adapter_state_dict(model))
    assert not torch.equal(run(plain, x), run(model, x)), "alpha does nothing here"
    path = ll.save(model, tmp_path / "x")
    fresh = case.model()
    handle = ll.load(fresh, path)
    scales = {p: t.cfg.scale for p, t in ll.adapters(model)["default"].record.targets.items()}
    assert len(set(scales.values())) > 1
    assert {p: t.cfg.scale for p, t in handle.record.targets.items()} == scales
    assert {p: t["scale"] for p, t in read(path)[0]["targets"].items()} == pytest.approx(scales)
    assert torch.equal(run(fresh, x), run(model, x))


@every_method(lambda case: hasattr(case.variant.config(), "use_rslora"))
def test_rslora_survives(case, tmp_path):
    r = case.cfg().r
    if r == 1:
        pytest.skip("no root to lose at rank 1")
    model, x = case.random(use_rslora=True), case.x()
    fresh = case.model()
    handle = ll.load(fresh, ll.save(model, tmp_path / "x"))
    alpha = case.cfg().effective_alpha
    assert all(t.cfg.scale == pytest.approx(alpha / r**0.5) for t in handle.record.targets.values())
    assert torch.equal(run(fresh, x), run(model, x))


@every_method(quick=("lora", "ia3", "loreft", "caa"))
def test_unknown_words_of_a_later_version(case, tmp_path):
    """Optional ones warn and are named; required ones raise and leave the model alone."""
    head, tensors = read(ll.save(case.random(), tmp_path / "x"))
    model = case.model()

    def write(new):
        save_file(tensors, str(tmp_path / "new.safetensors"), {"lora_lite": json.dumps(new)})
        return tmp_path / "new.safetensors"

    with pytest.warns(ll.LoraLiteWarning, match="novelty"):
        ll.load(model, write({**head, "config": {**head["config"], "novelty": 2}}), name="first")
    before = Snapshot(model)
    with pytest.raises(ll.FileError, match="novelty"):
        ll.load(model, write({**head, "requires": ["novelty"]}), name="second")
    assert not (d := before.difference(model)), d


@every_method(lambda case: case.linear, quick=OF_EACH_KIND)
def test_another_base_raises(case, tmp_path):
    path = ll.save(case.random(), tmp_path / "x")
    other = case.model()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.05)
    before = Snapshot(other, case.x())
    with pytest.raises(ll.BaseMismatchError, match=r"layers\.\d\.|embed"):
        ll.load(other, path)
    assert not (d := before.difference(other)), d


def test_forgetting_a_scale_would_show():
    """The test adapter at a 32nd of its scale is another function: what the class cost its users."""
    case = ll.testing.Case(ll.get_variant("lora"))
    model, x = case.random(), case.x()
    y = run(model, x)
    weak = case.model()
    case.attach(weak, alpha=case.cfg().effective_alpha / 32)
    randomise(weak)
    assert float((run(weak, x) - y).abs().max()) > 0.1
