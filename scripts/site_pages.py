"""The pages of the site that are made while it is built: one for each method, with a drawing of where it hooks, and one
for each notebook. mkdocs calls `on_config` and `on_files`; nothing is written into the repository."""

from __future__ import annotations

import html
import inspect
import json
import re
from pathlib import Path
from typing import Any

import lora_lite as ll
from lora_lite.cli._console import markdown
from lora_lite.cli._method import field_docs
from lora_lite.cli._picture import picture
from lora_lite.cli.variants import COLUMNS, RANK, TENSORS, WIDTH, cells, facts, tensors

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MEASURED = ("results/leaderboard.md", "results/learn.md", "results/speed.md", "results/cost.md", "what-works-where.md")
"""Pages with rows of single methods, those that exist."""
MOST = 2
"""Tests that are shown of one method."""
HERE = "METHODS"
"""The entry of the navigation that the methods replace."""


# ---- called by mkdocs


def on_config(config: Any) -> Any:
    """The methods by family, where the navigation says `METHODS`."""
    families = [
        {f"{family[:1].upper()}{family[1:]}": [{v.name: f"methods/{v.name}.md"} for v in methods]}
        for family, methods in by_family().items()
    ]
    config.nav = [
        {title: [entry for e in part for entry in (families if e == HERE else [e])] if isinstance(part, list) else part}
        for item in config.nav
        for title, part in item.items()
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """The pages and drawings themselves."""
    from mkdocs.structure.files import File

    for v in own_methods():
        files.append(File.generated(config, f"methods/{v.name}.md", content=page(v)))
        files.append(File.generated(config, f"methods/{v.name}.svg", content=drawing(v)))
    for path in sorted((DOCS / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook_page(path)))
    return files


# ---- a page for each method


def own_methods() -> list[type[ll.Variant]]:
    """The methods of the package, in alphabetical order."""
    return [v for v in ll.variants() if v.__module__.startswith("lora_lite.")]


def by_family() -> dict[str, list[type[ll.Variant]]]:
    """Family -> its methods, both in alphabetical order."""
    own = own_methods()
    return {family: [v for v in own if v.family == family] for family in sorted({v.family for v in own})}


def page(variant: type[ll.Variant]) -> str:
    """Formula, where it hooks, tensors, facts, options, what was measured, and its equation test."""
    _, _, about = inspect.cleandoc(variant.__doc__ or "").partition("\n\n")
    name, known = variant.name, facts(variant)
    common = {f.name for f in ll.AdapterConfig.__dataclass_fields__.values()}
    docs = field_docs(variant.config)
    own = [
        (f"`{f.name}`", f"`{f.default!r}`", docs.get(f.name, ""))
        for f in variant.config.__dataclass_fields__.values()
        if f.name not in common and f.name != "variant"
    ]
    shown = dict(zip(COLUMNS[2:], cells(known, link=True)[2:], strict=True))
    shown |= {"a fresh adapter": start_of(variant), "ignores": ", ".join(variant.ignores) or "-"}
    parts = [
        f"# {name}",
        f"{variant.title}.",
        "## Formula",
        about.strip(),
        "## Where it hooks",
        f"![{html.escape(picture_in_words(variant), quote=True)}]({name}.svg)",
        f"Tensors of one {WIDTH} x {WIDTH} layer at r = {RANK}, those that layers share included:",
        markdown(TENSORS, [(f"`{t}`", *rest) for t, *rest in tensors(variant)]),
        "## Facts",
        markdown(("fact", "value"), list(shown.items())),
        "## Use",
        f"```python\nll.attach(model, ll.{variant.config.__name__}({'' if 'r' in variant.ignores else 'r=8'}))\n```",
        f"```\nlora-lite train --method {name} --data rows.jsonl\nlora-lite variants {name} --model llama-8b\n```",
        *(["Its own options:", markdown(("option", "default", "what it does"), own)] if own else []),
        *measured(name),
        *equation_test(variant),
    ]
    return "\n\n".join(parts) + "\n"


def start_of(variant: type[ll.Variant]) -> str:
    """What a fresh adapter does."""
    if not variant.trains:
        return "acts at once: it is fitted, not trained"
    if variant.exact_identity:
        return "returns the base's output, bit for bit"
    if variant.identity_bound == float("inf"):
        return "departs from the base on purpose"
    return f"is within {variant.identity_bound:g} of the base's output"


def measured(name: str) -> list[str]:
    """The rows of this method on the pages of results, each under its own page's heading."""
    parts = []
    for place in MEASURED:
        path = DOCS / place
        if not path.is_file():
            continue
        text = path.read_text()
        title = text.splitlines()[0].lstrip("# ")
        for head, rows in rows_of(text, name):
            parts += [f"[{title}](../{place}):", "\n".join([head, "|" + " --- |" * (head.count("|") - 1), *rows])]
    return ["## Measured", *parts] if parts else []


def rows_of(text: str, name: str) -> list[tuple[str, list[str]]]:
    """(head, rows) of every table that has rows whose first cell is the method's name; goals are no measurements."""
    found = []
    for table in re.findall(r"(?:^\|.*\|\n?)+", text, re.M):
        head, _, *rows = table.splitlines()
        mine = [row for row in rows if re.match(rf"\| *`?{name}`? *\|", row) and "≤" not in row]
        if mine:
            found.append((head, mine))
    return found


def equation_test(variant: type[ll.Variant]) -> list[str]:
    """The test that compares the page with the paper's formula, folded."""
    found = tests_of(variant)
    if not found:
        return []
    parts = ["## The test of its equations"]
    for path in found:
        code = "\n".join(f"    {line}".rstrip() for line in path.read_text().splitlines())
        parts.append(f'??? note "{path.relative_to(ROOT)}"\n    ```python\n{code}\n    ```')
    return parts


def tests_of(variant: type[ll.Variant]) -> list[Path]:
    """The file named after the method, or the first ones that name its config or the method itself: of the equations,
    else of the comparisons with PEFT, else of the runtime."""
    tests = ROOT / "tests"
    own = tests / "equations" / f"test_{variant.name}.py"
    if own.is_file():
        return [own]
    words = re.compile(rf"\b{variant.config.__name__}\b|[\"']{variant.name}[\"']")
    for folder in ("equations", "parity", "runtime"):
        found = [path for path in sorted((tests / folder).glob("test_*.py")) if words.search(path.read_text())]
        if found:
            return found[:MOST]
    return []


# ---- drawings


def picture_in_words(variant: type[ll.Variant]) -> str:
    p = picture(variant)
    if p.beside:
        return f"{variant.name} puts {p.beside} into the {p.frozen.partition(',')[0]}"
    sides = [f"what goes into the {p.frozen.partition(',')[0]}"] * p.before + ["what comes out of it"] * p.after
    return f"{variant.name} rewrites {' and '.join(sides)}"


def drawing(variant: type[ll.Variant]) -> str:
    """The picture as SVG: what is frozen in grey, the method's page in blue."""
    p = picture(variant)
    canvas = Canvas(bool(p.beside))
    canvas.word(p.into)
    if p.before:
        canvas.box(variant.name, "page")
        canvas.word(f"{p.into}'")
    fork = canvas.x
    canvas.box(p.frozen, "frozen", over=(variant.name, p.beside) if p.beside else None)
    canvas.word(p.out)
    if p.after:
        canvas.box(variant.name, "page", around=fork - 14)
        canvas.word(f"{p.out}'")
    return canvas.svg(picture_in_words(variant))


class Canvas:
    """Boxes and words on one line, an arrow between any two."""

    def __init__(self, high: bool) -> None:
        self.x, self.y = 10.0, 110.0 if high else 30.0
        self.parts: list[str] = []
        self.begun = False

    def word(self, text: str) -> None:
        """A quantity."""
        self.arrow()
        width = 8.6 * len(text)
        self.text(self.x + width / 2, text, "word")
        self.x += width + 4

    def box(self, text: str, kind: str, over: tuple[str, str] | None = None, around: float | None = None) -> None:
        """A part of the model, or the page; `over` stands above it, `around` is where a line begins that leads round
        the part before."""
        self.arrow()
        width, x, y = 8.6 * len(text) + 24, self.x, self.y
        self.parts.append(f'<rect class="{kind}" x="{x}" y="{y - 19}" width="{width}" height="38" rx="5"/>')
        self.text(x + width / 2, text, kind)
        if around is not None:
            path = f"M{around} {y + 6} V{y + 40} H{x + width / 2} V{y + 24}"
            self.parts.append(f'<path class="line" d="{path}" marker-end="url(#tip)"/>')
        if over is not None:
            name, what = over
            wide = 8.6 * max(len(name), len(what)) + 24
            left = x + width / 2 - wide / 2
            self.parts.append(f'<rect class="page" x="{left}" y="8" width="{wide}" height="52" rx="5"/>')
            self.text(x + width / 2, name, "page", 28)
            self.text(x + width / 2, what, "page", 48)
            path = f"M{x + width / 2} 60 V{y - 24}"
            self.parts.append(f'<path class="line" d="{path}" marker-end="url(#tip)"/>')
        self.x += width + 4

    def text(self, x: float, text: str, kind: str, y: float | None = None) -> None:
        at = self.y + 5 if y is None else y
        self.parts.append(f'<text class="{kind}" x="{x:.1f}" y="{at}">{html.escape(text)}</text>')

    def arrow(self) -> None:
        if self.begun:
            path = f"M{self.x} {self.y} H{self.x + 26}"
            self.parts.append(f'<path class="line" d="{path}" marker-end="url(#tip)"/>')
            self.x += 34
        self.begun = True

    def svg(self, title: str) -> str:
        width, height = self.x + 10, self.y + 50
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
            f'height="{height:.0f}" role="img"><title>{html.escape(title)}</title>\n<style>'
            "text{font:15px ui-monospace,monospace;text-anchor:middle;fill:#24292f}"
            "rect.frozen{fill:#d8dee4;stroke:#6e7781}rect.page{fill:#cfe2ff;stroke:#0b57d0}"
            "text.word{fill:#57606a}.line{fill:none;stroke:#6e7781;stroke-width:1.6}"
            "svg{background:#fff}</style>\n"
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0 L8 4 L0 8 z" fill="#6e7781"/></marker></defs>\n' + "\n".join(self.parts) + "\n</svg>\n"
        )


# ---- a page for each notebook


def notebook_page(path: Path) -> str:
    """A notebook as a page: its text, its code, and what the code printed."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        said = "".join("".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in cell["outputs"])
        if said:
            parts.append(f"```text\n{said.rstrip()}\n```")
    parts.append(f"The notebook itself: [{path.name}]({path.name})")
    return "\n\n".join(parts) + "\n"
