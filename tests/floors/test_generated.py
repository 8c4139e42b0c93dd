"""Generated documents are what their scripts write today, and the API reference leaves nothing out."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lora_lite as ll

ROOT = Path(__file__).parents[2]
API = ROOT / "docs" / "api.md"
LISTED = sorted(set(dir(ll)) - {"testing", "callbacks", "__version__"})


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("rich")
    pytest.importorskip("tyro")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look names up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    [
        "readme_tables",
        "rooms_table",
        "api_reference",
        "methods_page",
        "architectures_page",
        "promises_page",
        "formats_page",
    ],
)
def test_generated_text_is_current(name, monkeypatch, capsys):
    module = script(name, monkeypatch)
    monkeypatch.setattr(sys, "argv", [name, "--check"])
    assert module.main() == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", ["readme_tables", "rooms_table", "api_reference", "methods_page"])
def test_stale_text_is_noticed_and_the_command_named(name, monkeypatch, capsys, tmp_path):
    module = script(name, monkeypatch)
    copy = tmp_path / "page.md"
    copy.write_text(re.sub(r"adapters|`lora`", "adaptors", module.PAGE.read_text()))
    monkeypatch.setattr(module, "PAGE", copy)
    monkeypatch.setattr(sys, "argv", [name, "--check"])
    assert module.main() == 1
    assert "is stale: make tables" in capsys.readouterr().out


def test_one_command_writes_all_of_them():
    recipe = re.search(r"^tables:.*?\n\n", (ROOT / "Makefile").read_text(), re.M | re.S)
    assert recipe is not None
    writers = {p.stem for p in (ROOT / "scripts").glob("*.py") if re.match(r'"""Write ', p.read_text())}
    assert writers == {
        "readme_tables",
        "rooms_table",
        "api_reference",
        "methods_page",
        "what_works_where",
        "cost_tables",
        "large_tables",
        "architectures_page",
        "promises_page",
        "formats_page",
    }
    assert all(name in recipe[0] for name in writers)


def test_a_page_of_other_rows_faults_or_versions_is_noticed(monkeypatch):
    """Both pages are compared by their names, without the runs behind them."""
    pytest.importorskip("transformers")
    models, promises = script("architectures_page", monkeypatch), script("promises_page", monkeypatch)
    for module, old, new, words in (
        (models, "| llama |", "| lama |", "llama is missing"),
        (models, "| unet | `UNet` |", "| unet | `Net` |", "unet has other faults"),
        (models, f"With {models.pinned()}:", "With torch 1.0:", "it was not made with"),
        (promises, "B7: the file", "B7: a file", "B7: the file"),
        (promises, "trust/test_b07", "trust/test_b70", "B7: the file"),
    ):
        text = module.PAGE.read_text()
        assert module.stale(text) == [] and text.count(old) >= 1
        assert any(words in line for line in module.stale(text.replace(old, new)))
    monkeypatch.setattr(promises, "SEVEN", ())
    monkeypatch.setitem(promises.PARTS, "more", (promises.Promise("x", ("tests/trust/test_gone.py::test_x",), ""),))
    assert promises.missing() == ["tests/trust/test_gone.py::test_x"]


def test_the_page_of_formats_speaks_of_every_type_and_layout(monkeypatch):
    """All types that are read were measured, none is off, and the README says what the page says."""
    module = script("formats_page", monkeypatch)
    _, rows = module.lines_of(module.RESULTS)
    _, tests = module.lines_of(module.TESTS)
    read = {r["what"] for r in rows if r["way"] == "read"}
    assert read | {r["peft_type"] for r in tests if r["outcome"] == "agrees"} >= {*module.TYPES, *module.PROMPTS} - {
        "POLY"
    }
    assert max(r["error"] for r in rows) <= 1e-5
    assert {r["outcome"] for r in tests} == {"agrees", "refused"}
    agree = sum(r["outcome"] == "agrees" for r in tests)
    assert agree >= 0.95 * len(tests) and len(tests) == 331
    assert f"{len(module.TYPES) + len(module.PROMPTS)} of its 45 types" in (ROOT / "README.md").read_text()
    assert f"{agree} of the 331 configurations of PEFT's own tests" in (ROOT / "README.md").read_text()


def test_the_figures_of_the_readme_are_those_measured():
    """Its comparison with PEFT is written by hand, from the committed measurements."""
    results = ROOT / "benchmarks" / "results"
    speed = {
        r["method"]: r
        for r in json.loads((results / "speed.json").read_text())["rows"]
        if (r["size"], r["shape"], r["r"]) == ("S4", "4x128", 8)
    }
    mixed = {
        r["run"]: r["ratio_to_base"]
        for r in json.loads((results / "mixed_batch.json").read_text())["rows"]
        if (r["method"], r["tokens"], r["adapters"]) == ("lora", 1, 16)
    }
    steps = " / ".join(f"{speed[m]['step_vs_peft']['median']:.2f}" for m in ("lora", "dora", "hra", "boft"))
    kept = [
        " / ".join(f"{speed[m][f'{side}_extra_saved_mb']:.0f}" for m in ("dora", "hra", "boft"))
        for side in ("ours", "peft")
    ]
    own = [v for v in ll.variants() if v.__module__.startswith("lora_lite.")]
    lines = [len(Path(inspect.getfile(v)).read_text().splitlines()) for v in own]
    text = (ROOT / "README.md").read_text()
    assert f"| {steps} | 1 |" in text
    assert f"| {kept[0]} | {kept[1]} |" in text
    assert f"| {mixed['lora_lite']:.1f} | {mixed['peft']:.1f} |" in text
    told = re.search(r"(\d+) lines in the median", text)  # one more page does not make it wrong
    assert told is not None and abs(statistics.median(lines) - int(told[1])) <= 3
    assert "more than eighty other methods" in text and len(lines) - 1 > 80


def test_every_room_and_wing_has_a_line():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    src = ROOT / "src" / "lora_lite"
    for place in [*src.glob("*/__init__.py"), *src.glob("runtime/*/__init__.py")]:
        assert re.search(rf"^\| \d \| `{place.parent.name}` \| \S", text, re.M), place


@pytest.mark.parametrize("name", LISTED)
def test_every_public_name_has_a_docstring_and_an_entry(name):
    obj = getattr(ll, name)
    kind = "class " if inspect.isclass(obj) else ""
    entry = re.search(rf"^### {kind}ll\.{name}$", API.read_text(), re.M)
    assert entry is not None, f"docs/api.md has no entry of ll.{name}: make tables"
    is_method = (
        inspect.isclass(obj) and issubclass(obj, ll.AdapterConfig) and name not in ("AdapterConfig", "BlockConfig")
    )
    own = next(v for v in ll.variants() if v.config is obj) if is_method else obj  # the method says it for its config
    doc = (vars(own).get("__doc__") if inspect.isclass(own) else own.__doc__) or ""
    assert len(doc.split()) > 2
    assert not doc.startswith(f"{own.__name__}("), "a dataclass's own signature is no docstring"


def test_every_name_of_testing_has_an_entry_and_every_type_that_a_call_returns():
    text = API.read_text()
    for name in ll.testing.__all__:
        assert re.search(rf"^### (class )?ll\.testing\.{name}\n\n\S", text, re.M), name
    for name in ("CheckReport", "MergeReport", "Layer"):
        assert re.search(rf"^### class (\S+\.)?{name}\n\n\S", text, re.M), name


def test_every_field_and_member_is_explained():
    assert re.findall(r"^- `[^`]*`:? *$", API.read_text(), re.M) == []
    assert " object at 0x" not in API.read_text() and "<function" not in API.read_text()


def test_the_table_of_contents_leads_to_the_headings():
    text = API.read_text()
    headings = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)]
    assert len(headings) == len(set(headings)), "two headings with one anchor"
    links = re.findall(r"\]\(#([^)]*)\)", text)
    assert len(links) > 100 and set(links) <= set(headings)
