"""PEFT's own config objects, attached here: as many trained numbers as PEFT has."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

import peft

import lora_lite as ll
import tiny_llm
from lora_lite.interop.peft_config import BEFORE, OTHERS, our_config
from peft_files import CASES, net
from peft_prompts import CONTEXT, THEIRS

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


@pytest.mark.parametrize("case", [c for c in THEIRS if "projected" not in c])
def test_what_stands_before_the_text(case):
    data = CONTEXT if case == "CARTRIDGE" else None
    theirs, model = peft.get_peft_model(tiny_llm.model(), THEIRS[case]()), tiny_llm.model()
    handle = ll.attach(model, THEIRS[case](), data)
    assert handle.num_parameters() == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_mixtures_have_the_same_sizes():
    cfg = our_config(peft.LilyConfig(r=3, stride_A=2, num_B=4, scaling=2.0, target_modules=["fc1"]), net())
    assert (cfg.variant, cfg.r, cfg.stride, cfg.experts, cfg.scale) == ("lily", 3, 2, 4, 2.0)
    cfg = our_config(peft.PolyConfig(r=3, n_tasks=4, n_skills=5, n_splits=2, target_modules=["fc1"]), net())
    assert (cfg.variant, cfg.tasks, cfg.skills, cfg.splits, cfg.alpha) == ("poly", 4, 5, 2, 1.0)


@pytest.mark.optional_backend("sklearn")
def test_clusters_have_the_same_numbers():
    cfg = our_config(peft.AdamssConfig(r=9, num_subspaces=3, subspace_rank=2, target_modules=["fc1"]), net())
    assert (cfg.variant, cfg.r, cfg.subspaces, cfg.subspace_rank) == ("adamss", 9, 3, 2)


def test_every_type_has_a_case():
    assert {*PLAIN, "LILY", "POLY", "ADAMSS"} >= set(OTHERS) and {c.split()[0] for c in THEIRS} == set(BEFORE)


def test_what_is_not_translated():
    with pytest.raises(ll.ConfigError, match="which is not translated"):
        ll.attach(net(), peft.FrodConfig(target_modules=["fc1"]))
