"""Every type of PEFT's that the table has, written by PEFT and read here."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("peft")

import lora_lite as ll
from lora_lite.io.peft_types import TYPES
from peft_files import CASES, IDS, config, error, net, saved

SLOW = [c for c in CASES if " " in c and c.split()[0] != "LORA" and c != "OFT exact"]


@pytest.fixture(autouse=True)
def plain_boft(monkeypatch):
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", False)  # do not try to compile the extension


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CASES])
def test_acts_as_it_does_in_peft(case, tmp_path):
    assert error(case, tmp_path) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("noise", [0.0, 1e-6])
@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CASES])
def test_a_start_and_its_first_step_too(case, noise, tmp_path):
    """A zero has no direction, and PEFT bounds lengths from below: what begins there computes the same, is finite, and
    learns."""
    _, want = saved(case, tmp_path, noise)
    model = net()
    if case == "HRA orthogonal":
        with pytest.raises(ll.FileError, match="whose vectors are parallel"):
            ll.load(model, tmp_path)
        return
    handle = ll.load(model, tmp_path, trainable=True)
    out = model(IDS)
    assert (out - want).abs().max() <= 1e-5 * want.abs().max()
    out.square().sum().backward()
    grads = [p.grad for p in handle.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in grads)
    assert any(g.abs().max() > 0 for g in grads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.optional_backend("sklearn")
def test_clusters_are_found_as_peft_finds_them(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "ADAMSS", config("AdamssConfig", r=6, num_subspaces=3, subspace_rank=2))
    assert error("ADAMSS", tmp_path) < 1e-5
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ll.FileError, match="pip install scikit-learn"):
        ll.load(net(), tmp_path)


def test_every_type_has_a_case():
    apart = {"ADAMSS", "POLY"}  # above, and in test_peft_prompts
    assert {case.split()[0] for case in CASES} | apart >= set(TYPES)
