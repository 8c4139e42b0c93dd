"""Every type of PEFT's that the table has, written by PEFT and read here."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("peft")

import lora_lite as ll
from lora_lite.io.peft_types import TYPES
from peft_files import CASES, config, error, net

SLOW = [c for c in CASES if " " in c and c.split()[0] != "LORA" and c != "OFT exact"]


@pytest.fixture(autouse=True)
def plain_boft(monkeypatch):
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", False)  # do not try to compile the extension


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CASES])
def test_acts_as_it_does_in_peft(case, tmp_path):
    assert error(case, tmp_path) < 1e-5


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
