"""The recipe of the bundled base: true statements, nothing of the task in them, and a run that resumes bit for bit."""

from __future__ import annotations

import importlib
import operator
import random
import re
import sys
from pathlib import Path

import pytest
import torch

VALUE = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain_demo.py"


@pytest.fixture(scope="module")
def recipe():
    if not SCRIPT.is_file():
        pytest.skip("the scripts are not part of an installed package")
    sys.path.insert(0, str(SCRIPT.parent))
    module = importlib.import_module("pretrain_demo")
    sys.path.remove(str(SCRIPT.parent))
    return module


@pytest.fixture(scope="module")
def statements(recipe):
    rng = random.Random(1)
    return [recipe.statement(rng) for _ in range(5000)]


def test_statements_are_true_and_small(statements):
    equations = [e for s in statements for e in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", s)]
    assert len(equations) > 5000
    for a, op, b, c in equations:
        assert VALUE[op](int(a), int(b)) == int(c)
        assert 0 <= int(c) < 200


def test_statements_hold_nothing_of_the_task(statements):
    text = "\n".join(statements)
    assert not re.search(r"####|[Hh]ow many|\b[QA]:", text)
    assert "boxs" not in text and "shelfs" not in text


@pytest.mark.slow
def test_prose_holds_no_answer_mark(recipe):
    texts = recipe.prose()
    assert len(texts) > 1000 and not any("####" in t for t in texts)


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run(recipe, tmp_path, monkeypatch):
    def run(folder, *more):
        argv = ["pretrain_demo", "--out", str(tmp_path / folder), "--steps", "6", "--rows", "2", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", [*argv, *more])
        recipe.main()
        return torch.load(tmp_path / folder / "state.pt", weights_only=True)

    whole = run("whole")
    half = run("parts", "--stop", "3")
    assert half["step"] == 3 and whole["step"] == 6
    parts = run("parts")
    assert parts["step"] == 6
    assert any(not torch.equal(half["model"][k], whole["model"][k]) for k in whole["model"])
    assert all(torch.equal(parts["model"][k], whole["model"][k]) for k in whole["model"])
    assert (tmp_path / "whole" / "log.jsonl").read_text().splitlines()[-1] == (
        tmp_path / "parts" / "log.jsonl"
    ).read_text().splitlines()[-1]
