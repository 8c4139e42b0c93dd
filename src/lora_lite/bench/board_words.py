"""What is said beside the leaderboard's tables: the protocol, and how much its figures bear."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

import lora_lite as ll

from .board import BEYOND, LEARNT, Protocol, Row, Scatter, Standing, scatter
from .sizes import NEAR


def protocol(rows: Sequence[Row]) -> list[str]:
    """The points of the protocol, which hold for every table."""
    made_of_others = ", ".join(v.name for v in ll.variants() if v.needs_data == "adapters" and v.trains)
    return [
        "The same number of optimiser steps (AdamW, no weight decay, clipping at 1, warm-up over 5 %, then a cosine) "
        "on the same rows in the same order for every method: 8 a step of wordmath, 32 of glosses, 4 of metamath.",
        "The same grid of rates for every method, times its recommended rate; the rate is chosen with seed 0 on "
        "validation questions that neither training nor the test has, by right answers and then by their loss. Where "
        f"the best stands at the grid's end, the next factor runs too, up to {BEYOND} times; a rate that is marked is "
        "an end even so, and a better one may lie outside.",
        "Then seeds 1, 2, ... at that rate on the test, each with another start and other rows: the mean, and half "
        "its 95 % interval by Student's t over seeds. The test's questions are the same for all.",
        "At its own lr: the share of right validation answers, seed 0, at the recommended rate, which is that of the "
        "method's authors for models thousands wide.",
        "Step / lora: the median over that of LoRA at its default size on the same batches, turn by turn in one "
        "process (processor time, one thread; of a GPU's rows wall clock, where the launches of kernels count and not "
        "the arithmetic); within a tenth it is noise. Step, MB: the most that a step's two passes hold beyond weights, "
        "adapter and optimiser. Forgotten: by how much the loss on text of the base's own training grew.",
        "In glosses a head of 24 classes is trained beside every adapter, at one rate (0.01) whatever the adapter's.",
        f"Ran on: {_machines(rows)}.",
        f"Not here: what is made of other adapters ({made_of_others}), and what does not train.",
    ]


def _machines(rows: Sequence[Row]) -> str:
    """How many runs on which device, and with which torch."""
    kinds = Counter((r.get("device", "?"), r.get("versions", {}).get("torch", "?")) for r in rows)
    return ", ".join(f"{device} with torch {torch} ({n} runs)" for (device, torch), n in kinds.most_common())


def at_one_size(protocol: Protocol) -> str:
    """How a table of one size differs from that of the default sizes."""
    factors = ", ".join(f"{factor:.3g}" for factor in sorted(protocol.grid))
    return (
        f"The size is the one field of a config that comes nearest, at most {100 * NEAR:.0f} % off; a method without a "
        "field in its name stands at its default size, with the runs of that table. The grid of the others is "
        f"{factors} times the recommended rate, and grows in the same way. A method that is absent reaches no such "
        "size, or has not run."
    )


def reading(standings: Sequence[Standing]) -> list[str]:
    """Which differences are chance: between means, to LoRA, by the questions, and by how the rate was chosen."""
    found = scatter(standings)
    if found is None:
        return []
    said = [
        f"Of the {len(found.standings)} methods that learnt (above {LEARNT:.0%}), a run lies {100 * found.sigma:.1f} "
        "points from its method's mean (standard deviation, pooled; what a seed's rows do to all alike is taken off). "
        f"So two means that lie less than {100 * found.apart():.0f} points apart are no ranking."
    ]
    said += [*_beside_lora(found), *_questions(found.standings)]
    shares = [list(s.rates.values()) for s in found.standings if len(s.rates) > 1]
    close = sum(first - second < found.apart(runs=1) for first, second, *_ in shares)
    said.append(
        f"One seed chose the rates: for {close} of {len(shares)} methods the second best lies within "
        f"{100 * found.apart(runs=1):.0f} points on validation, by which two runs may differ by chance."
    )
    return said


def _beside_lora(found: Scatter) -> list[str]:
    """Who is better than LoRA, who worse, and of whom nothing is known."""
    lora = next((s for s in found.standings if s.entry.method == "lora"), None)
    if lora is None:
        return []
    gaps = {s.entry.label: (s.mean or 0.0) - (lora.mean or 0.0) for s in found.standings if s is not lora}
    apart = found.apart(len(gaps))
    better = [name for name, gap in gaps.items() if gap > apart]
    worse = sum(gap < -apart for gap in gaps.values())
    return [
        f"Against LoRA, by seeds alone and with {len(gaps)} comparisons allowed for (Bonferroni: {100 * apart:.1f} "
        f"points), better: {', '.join(better) or 'none'}; worse: {worse}; not to be told from it: "
        f"{len(gaps) - len(better) - worse}."
    ]


def _questions(standings: Sequence[Standing]) -> list[str]:
    """What another test of as many questions would change."""
    numbers = {r.get("problems") for s in standings for r in s.finals}
    if len(numbers) != 1 or not (n := numbers.pop()):
        return []
    share = statistics.median(s.mean or 0.0 for s in standings)
    return [
        f"The test has {n:,} questions; others would move a figure by {100 * math.sqrt(share * (1 - share) / n):.1f} "
        "points (one standard error of the median method)."
    ]


def sizes_differ(standings: Sequence[Standing]) -> list[str]:
    """What a table of default sizes cannot say."""
    found = [(s.average("trained") or 0.0, s.mean or 0.0) for s in standings if s.mean is not None]
    if len(found) < 3 or any(len(set(figures)) == 1 for figures in zip(*found, strict=True)):
        return []
    trained, right = zip(*found, strict=True)
    return [
        f"Default sizes train from {min(trained):,.0f} to {max(trained):,.0f} parameters; the rank correlation of that "
        f"with right answers is {statistics.correlation(_ranks(trained), _ranks(right)):.2f}."
    ]


def _ranks(values: Sequence[float]) -> list[float]:
    """1, 2, ... by size; equal ones share theirs."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]


UNCHOSEN = ("method", "on validation", "lr", "times the recommended", "rates run")


def unchosen(protocol: Protocol) -> str:
    """How to read the table of entries whose rate is not chosen yet."""
    return (
        f"Whose rate is not chosen yet: the best of the rates that have run, of {len(protocol.grid)}, on validation "
        "questions with seed 0. Two such runs differ by some ten points by chance, and another rate may be better: "
        "this says whether a method learns at that rate, and not how well."
    )


def unchosen_lines(begun: Sequence[Standing], protocol: Protocol) -> list[list[str]]:
    """That table, the best first."""
    found = [(max(s.rates, key=lambda lr: s.rates[lr]), s) for s in begun]
    return [
        [s.entry.label, f"{s.rates[lr]:.1%}", f"{lr:g}", f"{protocol.factors(s.entry)[lr]:.3g}", str(len(s.rates))]
        for lr, s in sorted(found, key=lambda pair: -pair[1].rates[pair[0]])
    ]
