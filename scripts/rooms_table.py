"""Write the tables of rooms and wings in CONTRIBUTING.md: the order from tests/floors, what stands where from each
room's docstring.

python scripts/rooms_table.py            # rewrite what stands between the markers
python scripts/rooms_table.py --check    # exit 1 if that would change anything
"""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import sys
from pathlib import Path

from readme_tables import filled

from lora_lite.cli._console import markdown

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "lora_lite"
PAGE = ROOT / "CONTRIBUTING.md"
COMMAND = "make tables"


def about(place: Path) -> str:
    """The docstring of a folder or a file, without its floor, which has a column."""
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    doc = ast.get_docstring(ast.parse(file.read_text())) or ""
    return re.sub(r" \(floor \d\)", "", " ".join(doc.split("\n\n")[0].split()))


def rooms(floors: dict[str, int]) -> str:
    rows = [(str(floor), f"`{room}`", about(SRC / room)) for room, floor in sorted(floors.items(), key=lambda f: f[1])]
    return markdown(("floor", "room", "what stands there"), rows)


def wings(order: dict[str, int], verb: int) -> str:
    runtime = SRC / "runtime"
    rows = [(str(n), f"`{wing}`", about(runtime / wing)) for wing, n in sorted(order.items(), key=lambda w: w[1])]
    verbs = sorted(f.stem for f in runtime.glob("*.py") if f.stem not in {"__init__", *order})
    return markdown(
        ("floor", "wing", "what stands there"),
        [*rows, (str(verb), ", ".join(f"`{v}`" for v in verbs), "One file per verb, and what they share.")],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    order = runpy.run_path(str(ROOT / "tests" / "floors" / "test_floors.py"))
    old = PAGE.read_text()
    new = filled(filled(old, "rooms", rooms(order["FLOORS"])), "wings", wings(order["WINGS"], order["VERB"]))
    if parser.parse_args().check:
        if new != old:
            print(f"CONTRIBUTING.md is stale: {COMMAND}")
        return int(new != old)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
