"""Every type of PEFT's that the table has, written by PEFT and read here."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

from lora_lite.io.peft_types import TYPES
from peft_files import CASES, error

SLOW = [c for c in CASES if " " in c and c.split()[0] != "LORA" and c != "OFT exact"]


@pytest.fixture(autouse=True)
def plain_boft(monkeypatch):
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", False)  # do not try to compile the extension


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CASES])
def test_acts_as_it_does_in_peft(case, tmp_path):
    assert error(case, tmp_path) < 1e-5


def test_every_type_has_a_case():
    assert {case.split()[0] for case in CASES} >= set(TYPES)
