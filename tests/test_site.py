"""The site: a page and a drawing for each method, each notebook as a page, and the whole built strictly."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest

import lora_lite as ll

pytest.importorskip("rich")
ROOT = Path(__file__).parents[1]
OWN = [v for v in ll.variants() if v.__module__.startswith("lora_lite.")]


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scripts_site_pages", ROOT / "scripts" / "site_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("variant", OWN, ids=lambda v: v.name)
def test_the_page_of_a_method(pages, variant):
    text = pages.page(variant)
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings[:4] == ["Formula", "Where it hooks", "Facts", "Use"]
    assert text.startswith(f"# {variant.name}\n") and f"]({variant.name}.svg)" in text
    assert f"| {'lr':<2} | {variant.lr:g} |" in text or not variant.trains
    assert "The test of its equations" in headings and pages.tests_of(variant)
    for link in re.findall(r"\]\((\.\./[^)]*)\)", text):
        assert (ROOT / "docs" / "methods" / link).resolve().is_file(), link


@pytest.mark.parametrize("variant", OWN, ids=lambda v: v.name)
def test_its_drawing(pages, variant):
    """The page stands before the frozen part where it rewrites what goes in, after it where it rewrites what comes
    out."""
    space = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(pages.drawing(variant))
    boxes = sorted(root.iter(f"{space}rect"), key=lambda box: float(box.attrib["x"]))
    kinds = [box.attrib["class"] for box in boxes]
    beside = variant.prefix is not None or variant.tokens is not None
    before = variant.forward_input is not None
    after = not beside and (variant.forward is not None or variant.weight is not None)
    if beside:
        assert sorted(kinds) == ["frozen", "page"]
    else:
        assert kinds == ["page"] * before + ["frozen"] + ["page"] * after and before + after
    assert variant.name in [t.text for t in root.iter(f"{space}text")]


def test_rows_of_a_method_are_found_in_tables_and_nowhere_else(pages):
    text = "x\n\n| method | a |\n|---|---|\n| lora | 1 |\n| lora_fa | 2 |\n\nlora\n\n| `lora` |\n|---|\n| no |\n"
    assert pages.rows_of(text, "lora") == [("| method | a |", ["| lora | 1 |"])]
    assert pages.rows_of(text, "dora") == []
    row = next(
        line for line in (ROOT / "docs/results/learn.md").read_text().splitlines() if line.startswith("| lora |")
    )
    assert row in "\n".join(pages.measured("lora"))


def test_a_notebook_as_a_page(pages):
    text = pages.notebook_page(ROOT / "docs" / "notebooks" / "new-method.ipynb")
    assert text.startswith("# A new method in a page") and "```python\n" in text and "```text\n" in text


def test_the_navigation_leads_to_every_page_of_docs():
    listed = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    docs = ROOT / "docs"
    there = {str(path.relative_to(docs)) for path in docs.rglob("*.md")}
    made = {f"notebooks/{path.stem}.md" for path in (docs / "notebooks").glob("*.ipynb")}
    assert listed == there | made


def test_every_picture_is_shown_by_a_page():
    docs = ROOT / "docs"
    text = "".join(path.read_text() for path in [ROOT / "README.md", *docs.rglob("*.md")])
    pictures = [p for p in docs.rglob("*") if p.suffix in (".png", ".svg")]
    assert pictures and not [p.name for p in pictures if f"{p.name})" not in text]


@pytest.mark.slow
@pytest.mark.optional_backend("mkdocs")
def test_the_site_is_built_strictly(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site" / "methods" / "dora.html").is_file()
    assert (tmp_path / "site" / "search" / "search_index.json").stat().st_size > 100_000
    assert 'src="http' not in (tmp_path / "site" / "index.html").read_text()  # nothing is fetched from elsewhere
