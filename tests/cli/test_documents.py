"""The README and the guides: their code runs, their links lead somewhere, their commands exist."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import sys
import types
from pathlib import Path

import pytest

import lora_lite as ll
import tiny_llm
from lora_lite import cli
from lora_lite.cli._method import chosen_method, with_method
from lora_lite.cli.bench_learn import Learn

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *RECIPES]
VERBS = {
    name: getattr(importlib.import_module(f"lora_lite.cli.{name}"), command) for name, command in cli.VERBS.items()
}


SLOW = {"chat-model", "dpo"}
"""Recipes that train through TRL."""


def blocks(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.fixture(autouse=True)
def registry_as_it_was():
    from lora_lite.core import registry
    from lora_lite.runtime.layers import kinds

    tables: list[dict] = [registry._TABLE, kinds.KINDS]
    before = [dict(table) for table in tables]
    yield
    for table, own in zip(tables, before, strict=True):
        table.clear()
        table.update(own)


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The bundled base, or a random stand-in in a checkout without it; the working directory is empty."""
    from lora_lite.demo import data

    if not (data.BASE / "config.json").is_file():
        monkeypatch.setattr(data, "BASE", tiny_llm.save(tmp_path / "base"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in SLOW), id=p.stem) for p in PAGES if blocks(p)],
)
def test_the_code_of_a_page_runs(page, base, tmp_path, monkeypatch):
    code = blocks(page)
    script = tmp_path / f"{page.stem.replace('-', '_')}.py"
    script.write_text("\n\n".join(code))
    module = types.ModuleType(script.stem)
    monkeypatch.setitem(sys.modules, script.stem, module)  # where dataclasses look names up
    exec(compile(script.read_text(), str(script), "exec"), vars(module))


def test_every_recipe_has_code_and_all_are_there():
    wanted = {"chat-model", "four-bit", "dpo", "classification", "diffusion", "speech", "many-adapters",
              "merging-and-shipping"}  # fmt: skip
    assert {p.stem for p in RECIPES} == wanted
    assert all(blocks(p) for p in RECIPES)


def test_the_readme_has_code_and_so_has_the_guide_to_methods():
    assert len(blocks(ROOT / "README.md")) == 1
    assert len(blocks(ROOT / "docs" / "adding-a-method.md")) >= 6


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_commands_on_a_page_exist(page):
    for line in re.findall(r"^lora-lite .*|`(lora-lite [^`]*)`", page.read_text(), re.M):
        words = shlex.split(line, comments=True)[1:]
        if words in ([], ["--help"]) or "NAME" in words:
            continue
        assert words[0] in VERBS, line
        command = Learn if words[:2] == ["bench", "learn"] else VERBS[words[0]]
        if hasattr(command, "method"):
            command = with_method(command, chosen_method(words))
        flags = {f.name for f in dataclasses.fields(command)} | set(getattr(command, "aliases", ()))
        if "method" in flags:
            flags |= {f.name for f in dataclasses.fields(chosen_method(words).config)}
        for word in words[1:]:
            if word.startswith("--") and word != "--help":
                assert word[2:].partition("=")[0].replace("-", "_") in flags, line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_names_on_a_page_exist(page):
    for name in set(re.findall(r"\bll\.(\w+)", page.read_text())):
        assert hasattr(ll, name), f"ll.{name}"


def test_the_methods_that_choosing_names_exist():
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+`) \|", (ROOT / "docs" / "choosing.md").read_text(), re.M)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert len(named) > 10
    assert named <= {v.name for v in ll.variants()}
