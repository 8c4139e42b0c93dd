"""Write the tables of docs/demo.md, the demo's figures from its runs, of README.md, the leaderboard's front, and of
docs/choosing.md, the best rates on the leaderboard.

python scripts/readme_tables.py                      # rewrite what stands between the markers
python scripts/readme_tables.py --check              # exit 1 if that would change anything
python scripts/readme_tables.py --demo runs/demo-*/run.json    # keep these runs as docs/demo.json, then rewrite
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from lora_lite.bench import board
from lora_lite.bench.boards import EDGE, Board, boards
from lora_lite.cli._console import markdown
from lora_lite.core.registry import get_variant

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "demo.md"
RUNS = ROOT / "docs" / "demo.json"
README = ROOT / "README.md"
CHOOSING = ROOT / "docs" / "choosing.md"
ROWS = ROOT / "benchmarks" / "results" / "learn.jsonl"
FRONT = ("lora", "dora", "pissa", "loha", "lokr", "vera", "hra", "oft", "delora", "ia3", "adalora")
"""Methods of the README's table, where their runs are finished."""
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


def learnt() -> str:
    """The leaderboard's lines of `FRONT` at default sizes, the best mean first, and what they reach at chosen sizes."""
    rows = board.read(ROWS)
    found = [b for b in boards(rows) if b.protocol.task == "wordmath"]
    usual = next((b for b in found if b.parameters is None), None)
    if usual is None:
        return "Not measured yet."
    protocol, standings = usual.protocol, usual.standings(rows)
    sized = [b for b in found if b.parameters and b.protocol.steps == protocol.steps]
    lines = []
    for s in (s for s in standings if s.entry.method in FRONT and len(s.finals) == protocol.seeds):
        assert s.chosen is not None
        edge = EDGE if s.chosen in (min(s.rates), max(s.rates)) else ""
        times = f"{s.chosen / get_variant(s.entry.method).lr:.0f} x{edge}"
        others = (_at_size(rows, b, s.entry.method) for b in sized)
        lines.append((f"`{s.entry.method}`", _interval(s), times, f"{s.average('trained'):,.0f}", *others))
    note = (
        f"Exact match on generated word problems after {protocol.steps} steps on the bundled base, which begins at "
        f"0 %: mean of {protocol.seeds} seeds with its 95 % interval, at the best of {len(protocol.grid)} rates or "
        f"more, chosen on other problems. {_reading(standings)}"
        f"{' On the right at other sizes (best of 3 rates or more); -: none is so near, or has run.' if sized else ''}"
    )
    columns = (
        "method",
        "right",
        "of its recommended rate",
        "trained",
        *(f"with about {b.parameters:,}" for b in sized),
    )
    return f"{note}\n\n{markdown(columns, lines)}"


def _interval(s: board.Standing) -> str:
    return "-" if s.mean is None or s.half is None else f"{100 * s.mean:.0f} % ± {100 * s.half:.0f}"


def _at_size(rows: Sequence[board.Row], at: Board, method: str) -> str:
    """What a method reaches near this number of trained parameters, if it can."""
    found = next((s for s in at.standings(rows) if s.entry.method == method), None)
    return "-" if found is None or len(found.finals) < at.protocol.seeds else _interval(found)


def _reading(standings: Sequence[board.Standing]) -> str:
    """Which differences of the leaderboard are none."""
    found = board.scatter(standings)
    return "" if found is None else f"Means that lie less than {100 * found.apart():.0f} points apart are no ranking."


def rates() -> str:
    """Which methods learn best at which multiple of their recommended rate, and what its neighbours cost."""
    rows = board.read(ROWS)
    usual = next(b for b in boards(rows) if b.parameters is None and b.protocol.task == "wordmath")
    protocol = usual.protocol
    done = [s for s in usual.standings(rows) if s.chosen is not None and s.rates[s.chosen] > board.LEARNT]
    lines, lower, higher = dict[float, list[str]](), list[float](), list[float]()
    for s in sorted(done, key=lambda s: s.entry.method):
        assert s.chosen is not None
        factors = protocol.factors(s.entry)
        lines.setdefault(factors[s.chosen], []).append(f"`{s.entry.method}`")
        every, here = list(factors), list(factors).index(s.chosen)
        for costs, rate in ((lower, every[max(0, here - 1)]), (higher, every[min(len(every) - 1, here + 1)])):
            if rate in s.rates and rate != s.chosen:
                costs.append(100 * (s.rates[s.chosen] - s.rates[rate]))
    table = markdown(
        ("times its recommended rate", "methods for which one seed chose it"),
        [(f"{factor:.3g}", ", ".join(lines[factor])) for factor in sorted(lines)],
    )
    return (
        f"{table}\n\nOf the {len(done)} methods that learnt there (validation questions, seed 0): a third of the best "
        f"rate costs {statistics.median(lower):.0f} points of accuracy in the median, three times as much "
        f"{statistics.median(higher):.0f}."
    )


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
    stale = []
    for page, name, body in ((PAGE, "demo", demo()), (README, "learn", learnt()), (CHOOSING, "rates", rates())):
        old = page.read_text()
        new = filled(old, name, body)
        if new != old and args.check:
            stale.append(page.name)
            print(f"{page.name} is stale: make tables")
        elif new != old:
            page.write_text(new)
    return int(bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
