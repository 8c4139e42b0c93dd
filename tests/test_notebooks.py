"""The notebooks run from first to last cell, and are kept with what they printed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def script():
    spec = importlib.util.spec_from_file_location("scripts_notebooks", ROOT / "scripts" / "notebooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def registry_as_it_was():
    from lora_lite.core import registry

    before = dict(registry._TABLE)
    yield
    registry._TABLE.clear()
    registry._TABLE.update(before)


def test_all_are_there():
    assert {p.stem for p in NOTEBOOKS} == {"first-adapter", "new-method", "many-adapters", "steering"}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs_and_prints_as_kept(path, tmp_path, monkeypatch, registry_as_it_was):
    """Every cell that printed something prints something; the figures may differ from machine to machine."""
    from lora_lite.demo import data

    if not (data.BASE / "config.json").is_file():
        pytest.skip("a checkout without the bundled base")
    monkeypatch.chdir(tmp_path)
    kept = json.loads(path.read_text())
    done = script().executed(kept, path.stem.replace("-", "_"))
    for old, new in zip(kept["cells"], done["cells"], strict=True):
        assert bool(old.get("outputs")) == bool(new.get("outputs")), new["source"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_file_is_a_notebook_that_has_run(path):
    kept = json.loads(path.read_text())
    code = [cell for cell in kept["cells"] if cell["cell_type"] == "code"]
    assert (kept["nbformat"], kept["cells"][0]["cell_type"]) == (4, "markdown") and len(code) >= 3
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any(cell["outputs"] for cell in code)


def test_a_cell_that_fails_is_noticed_and_a_last_value_is_shown():
    module = script()
    names: dict = {}
    assert module.run("x = 2\nprint(x)\nx + 1", "here", names) == "2\n3\n"
    assert module.run("None", "here", names) == "" and module.outputs("") == []
    cell = {"cell_type": "code", "source": ["assert x == 3"], "outputs": []}
    with pytest.raises(NameError):
        module.executed({"cells": [cell]}, "broken")
