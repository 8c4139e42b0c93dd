"""Write the table of docs/demo.md: the demo's figures from its runs.

python scripts/readme_tables.py                      # rewrite what stands between the markers
python scripts/readme_tables.py --check              # exit 1 if that would change anything
python scripts/readme_tables.py --demo runs/demo-*/run.json    # keep these runs as docs/demo.json, then rewrite
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from lora_lite.cli._console import markdown

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "demo.md"
RUNS = ROOT / "docs" / "demo.json"
KEEP = ("method", "seed", "steps", "lr", "trained", "problems", "accuracy_before", "accuracy_after", "cpu_seconds")


def demo() -> str:
    """The demo's runs, one line per method: every seed's accuracy, their mean and spread."""
    if not RUNS.is_file():
        return "Not measured yet."
    runs = json.loads(RUNS.read_text())
    rows = []
    for name in dict.fromkeys(r["method"] for r in runs):
        mine = sorted((r for r in runs if r["method"] == name), key=lambda r: r["seed"])
        after = [r["accuracy_after"] for r in mine]
        spread = f" ± {statistics.stdev(after):.1%}" if len(after) > 1 else ""
        rows.append(
            (
                f"`{name}`",
                f"{mine[0]['trained']:,}",
                f"{mine[0]['accuracy_before']:.1%}",
                ", ".join(f"{a:.1%}" for a in after),
                f"{statistics.mean(after):.1%}{spread}",
                f"{max(r['cpu_seconds'] for r in mine):.0f} s",
            )
        )
    n, steps = runs[0]["problems"], runs[0]["steps"]
    note = (
        f"Accuracy on {n} test problems, whose sentences, names and numbers no training problem has, after {steps} "
        "steps; one figure per seed, then mean and standard deviation. The base can calculate but has never seen a "
        "word problem or the form of the answer, hence its zero. Processor time is that of the slowest run on one "
        "core, imports and both evaluations included."
    )
    columns = ("method", "trained", "base", "adapted, per seed", "mean", "processor time")
    return f"{note}\n\n{markdown(columns, rows)}"


def filled(text: str, name: str, body: str) -> str:
    """`text` with `body` between the markers `<!-- name:begin -->` and `<!-- name:end -->`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"the markers {begin} and {end} must stand in the file once each.")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{body}\n{end}{rest.split(end)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--demo", nargs="+", type=Path, metavar="RUN_JSON")
    args = parser.parse_args()
    if args.demo:
        kept = [{k: json.loads(path.read_text())[k] for k in KEEP} for path in args.demo]
        RUNS.write_text(json.dumps(kept, indent=1) + "\n")
    old = PAGE.read_text()
    new = filled(old, "demo", demo())
    if args.check:
        if new != old:
            print("docs/demo.md is stale: make tables")
        return int(new != old)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
