"""The bundled base: small files, real arithmetic, nothing of the task, and an adapter that learns the task."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lora_lite.demo.data import BASE, load_model
from lora_lite.demo.evaluate import complete, evaluate
from lora_lite.demo.wordmath import generate

SCRIPT = Path(__file__).parents[2] / "scripts" / "adapt_demo.py"


@pytest.fixture(scope="module")
def demo():
    return load_model("demo")


def test_files_are_small_and_bf16():
    sizes = {f.name: f.stat().st_size for f in BASE.iterdir()}
    assert sum(sizes.values()) < 8_000_000 and max(sizes.values()) < 2_000_000, sizes
    for file in BASE.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            assert {f.get_tensor(k).dtype for k in f.keys()} == {torch.bfloat16}  # noqa: SIM118 -- not a mapping


def test_no_file_needs_a_newer_transformers_than_the_floor():
    facts = json.loads((BASE / "tokenizer_config.json").read_text())
    assert facts["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_size_and_tokens(demo):
    model, tok = demo
    assert 1_000_000 < sum(p.numel() for p in model.parameters()) < 3_000_000
    assert [tok.decode([t]) for t in tok("a 14")["input_ids"]] == ["a", " 1", "4"]
    assert len({tok.pad_token_id, tok.bos_token_id, tok.eos_token_id}) == 3
    text = "Zoë's 3 boxes:\n\t12 + 30 = 42?"
    assert tok.decode(tok(text)["input_ids"]) == text


def test_it_adds_and_knows_its_tables(demo):
    rng = random.Random(5)
    pairs = [(rng.randint(2, 60), rng.randint(2, 60)) for _ in range(40)]
    products = [(rng.randint(2, 9), rng.randint(2, 9)) for _ in range(40)]
    prompts = [f"1 + 1 = 2.\n{a} + {b} =" for a, b in pairs] + [f"1 + 1 = 2.\n{a} * {b} =" for a, b in products]
    values = [a + b for a, b in pairs] + [a * b for a, b in products]
    said = [s.split(".")[0].split("\n")[0].strip() for s in complete(*demo, prompts, max_new_tokens=5)]
    assert sum(s == str(v) for s, v in zip(said, values, strict=True)) >= 72  # of 80


def test_it_looks_quantities_up_again(demo):
    rng = random.Random(6)
    pairs = [(rng.randint(2, 20), rng.randint(21, 60)) for _ in range(40)]
    prompts = [f"Tom is {a}; Ann is {b}. Ann minus Tom:" for a, b in pairs]
    said = [s.split(".")[0].strip() for s in complete(*demo, prompts, max_new_tokens=9)]
    assert sum(s == f"{b} - {a} = {b - a}" for s, (a, b) in zip(said, pairs, strict=True)) >= 32


def test_the_bare_base_does_not_do_the_task(demo):
    assert evaluate(*demo, generate("test", 60)).accuracy < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("library", ["lora-lite", "peft"])
def test_an_adapter_learns_the_task(library, monkeypatch, capsys):
    if not SCRIPT.is_file():
        pytest.skip("the scripts are not part of an installed package")
    spec = importlib.util.spec_from_file_location("adapt_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["adapt_demo", "--library", library])
    module.main()
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["base"] < 0.05
    assert facts["adapter"] > 0.6  # measured: 0.72 here, 0.77 with peft
