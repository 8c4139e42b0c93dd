"""Every method through every ability: it works, or is refused with a sentence; and the generated page says so."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import lora_lite as ll
from lora_lite.testing.abilities import ABILITIES, ABOUT, outcome

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("what_works_where", ROOT / "scripts" / "what_works_where.py")
assert SPEC is not None and SPEC.loader is not None
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)

METHODS = [v.name for v in ll.variants() if v.__module__.startswith("lora_lite.")]
QUICK = [a for a in ABILITIES if a != "one graph"]  # every method is compiled by test_compiled.py already


def committed():
    lines = [line.split("|")[1:-1] for line in script.PAGE.read_text().splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    assert head == ["method", *ABILITIES]
    return {row[0].strip("`"): dict(zip(head[1:], row[1:], strict=True)) for row in rows}


@pytest.mark.parametrize("method", METHODS)
def test_the_page_says_what_is(method):
    row = committed().get(method)
    assert row is not None, f"docs/what-works-where.md has no row of {method}: make tables"
    for name in QUICK:
        found = outcome(method, name)
        assert row[name] == ("✓" if found.works else "-"), f"{name}: {found}; if that is right: make tables"
        if not found.works:
            assert len(found.refusal.split()) > 8, f"{name} is refused without a sentence: {found.refusal}"


def test_the_page_has_every_method_and_no_other():
    assert list(committed()) == METHODS, "docs/what-works-where.md lists other methods: make tables"
    assert all(ABOUT[name] in script.PAGE.read_text() for name in ABILITIES)


@pytest.mark.slow
def test_the_whole_page_is_up_to_date():
    assert script.PAGE.read_text() == script.page(script.rows()), "docs/what-works-where.md is stale: make tables"


def lora(layer, x, y):
    return y + (x @ layer.lora_A.mT) @ layer.lora_B.mT * layer.cfg.scale


FAULTS = {
    # the grouped path uses `factors`, which no longer agree with the page
    "rows": lambda layer, x, y: y + (x @ layer.lora_A.mT) @ layer.lora_B.mT,
    # not affine, though it says so
    "merge": lambda layer, x, y: lora(layer, x.tanh(), y),
    # differs from call to call, as a mask drawn anew in the recomputation would
    "checkpointing": lambda layer, x, y: lora(layer, x * torch.rand(()), y),
    # the exported factors are not the function
    "PEFT": lambda layer, x, y: lora(layer, x, y) + 0.1 * layer.lora_B.sum(1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(name, monkeypatch):
    variant = ll.get_variant("lora")
    assert outcome(variant, name).works
    monkeypatch.setattr(variant, "forward", staticmethod(FAULTS[name]))
    with pytest.raises(AssertionError):
        outcome(variant, name)
