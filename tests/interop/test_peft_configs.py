"""PEFT's own config objects, attached here: as many trained numbers as PEFT has."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

import peft

import lora_lite as ll
from lora_lite.interop.peft_config import OTHERS
from peft_files import CASES, net

LORA = ("LORA", "LORA rslora", "LORA regular expression", "LORA modules", "DoRA")
PLAIN = [c for c in CASES if c in OTHERS or c in LORA]
DIFFERENT = {"BOFT", "DELORA", "DEFT", "HRA", "BEFT", "SHIRA", "LN_TUNING", "LORA modules", "PSOFT", "MISS"}
"""Whose pages hold other tensors than PEFT's: deviations, or biases where PEFT has none."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", PLAIN)
def test_attached_as_it_is(case, monkeypatch):
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", False)
    said = CASES[case]()
    theirs = peft.get_peft_model(net(), CASES[case]())
    wrapped = {
        n.split(".lora_magnitude")[0] for n, m in theirs.base_model.model.named_modules() if hasattr(m, "base_layer")
    }
    model = net()
    handle = ll.attach(model, said)
    targets = {t for t in handle.targets if t in {n.removesuffix(".base_layer") for n in wrapped}}
    assert targets == {n for n in wrapped if not n.endswith("base_layer")}
    if case not in DIFFERENT:
        count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
        assert sum(p.numel() for p in handle.parameters()) == count


def test_a_plan_takes_it_too():
    assert ll.plan(net(), peft.LoraConfig(r=2, target_modules=["fc1"])).targets[0].path == "fc1"


def test_every_type_has_a_case():
    assert set(PLAIN) >= set(OTHERS)


def test_what_is_not_translated():
    with pytest.raises(ll.ConfigError, match="which is not translated"):
        ll.attach(net(), peft.FrodConfig(target_modules=["fc1"]))
