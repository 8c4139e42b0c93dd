"""The kinds of problem in wordmath: how numbers are drawn, which operations solve them, and how they are worded.

A wording is a small grammar: `[a|b|*c]` is one of a, b, c, and a phrase that begins with `*` is kept from the training
split. {p} {q} are people, {t} things, {x} {y} containers, {0} {1} .. the numbers.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

Numbers = tuple[int, ...]
Step = tuple[int, str, int]


@dataclass(frozen=True)
class Kind:
    """One structure of operations."""

    draw: Callable[[random.Random], Numbers]
    solve: Callable[..., list[Step]]
    """numbers -> the steps (a, op, b) in order."""
    wordings: tuple[str, ...]


def expand(wording: str) -> list[tuple[str, bool]]:
    """All sentences of a wording, each with whether it holds a phrase that is kept from training."""
    parts = [part.split("|") for part in re.split(r"[\[\]]", wording)]
    return [
        ("".join(phrase.removeprefix("*") for phrase in choice), any(phrase.startswith("*") for phrase in choice))
        for choice in itertools.product(*parts)
    ]


HAS = "[{p} has {0} {t}|{p} owns {0} {t}|{p} starts with {0} {t}|*{p} holds {0} {t}]. "
IN_BOX = "[There are {0} {t} in a {x}|A {x} holds {0} {t}|{p} keeps {0} {t} in a {x}|*A {x} has {0} {t} in it]. "
NOW = "How many {t} does {p} have [now|in all|then|*all together]?"
LEFT = "How many {t} [does {p} have left|are left|does {p} have now|*does {p} keep]?"
IN_IT = "How many {t} are [in the {x} now|in it now|in the {x} then|*left in the {x}]?"
BOTH = "How many {t} do they have [together|in all|*all together]?"
THERE = "How many {t} are there [in all|together|*all together]?"
EACH = "How many {t} [does each get|does each of them get|are that for each|*does every one get]?"


def gain(n: str) -> str:
    return (
        f"[{{q}} gives {{p}} {n} more|{{p}} gets {n} from {{q}}|{{p}} finds {n} more {{t}}|{{p}} buys {n} {{t}}"
        f"|*{{p}} picks {n} more|*{{p}} wins {n} {{t}}]"
    )


def lose(n: str) -> str:
    return (
        f"[{{p}} gives {n} to {{q}}|{{p}} loses {n} of them|{{p}} sells {n} {{t}}|{{q}} takes {n} of them"
        f"|*{{p}} gives away {n}|*{{p}} drops {n} {{t}}]"
    )


def groups(n: str, size: str, box: str = "{x}") -> str:
    return (
        f"{n} {box}s [with {size} {{t}} each|with {size} {{t}} in each {box}|of {size} {{t}}|*that hold {size} {{t}} "
        "each]"
    )


def share(n: str, all_of: str) -> str:
    return (
        f"[{{p}} shares {all_of} equally among {n} friends|{n} friends share {all_of} equally"
        f"|{{p}} splits {all_of} equally among {n} friends|*{{p}} divides {all_of} among {n} friends]. "
    )


def _add_share(r: random.Random) -> Numbers:
    each, friends = r.randint(3, 12), r.randint(2, 9)
    a = r.randint(2, each * friends - 2)
    return a, each * friends - a, friends


def _share_sub(r: random.Random) -> Numbers:
    each, friends = r.randint(3, 15), r.randint(2, 9)
    return each * friends, friends, r.randint(1, each - 1)


def _times_sub(r: random.Random) -> Numbers:
    a, b = r.randint(3, 12), r.randint(3, 12)
    return a, b, r.randint(2, a * b - 1)


ONE_STEP = {
    "add": Kind(
        lambda r: (r.randint(2, 90), r.randint(2, 90)),
        lambda a, b: [(a, "+", b)],
        (
            HAS + "[Then |]" + gain("{1}") + ". " + NOW,
            IN_BOX + "[{p} puts in {1} more|{q} adds {1} {t}|*{p} puts {1} {t} in as well]. " + IN_IT,
            "{p} [has|finds|buys|*picks] {0} {t} and {q} [has|finds|buys|*picks] {1}[| {t}]. " + BOTH,
            "{p} has {0} {t}. {q} has {1} [more|more {t}] than {p}. How many {t} does {q} have[| now|*, then]?",
        ),
    ),
    "sub": Kind(
        lambda r: (a := r.randint(10, 120), r.randint(2, a - 1)),
        lambda a, b: [(a, "-", b)],
        (
            HAS + "[Then |]" + lose("{1}") + ". " + LEFT,
            IN_BOX + "[{p} takes out {1}|{q} takes {1} of them|*{p} takes {1} {t} out of it]. " + IN_IT,
            "{p} has {0} {t}[.| and] {q} has {1}[| {t}]. How many [more {t} does {p} have|{t} more does {p} have] "
            "than {q}?",
            "{p} has {0} {t}. {q} has {1} [less|less {t}] than {p}. How many {t} does {q} have[| now|*, then]?",
        ),
    ),
    "times": Kind(
        lambda r: (r.randint(2, 12), r.randint(2, 15)),
        lambda a, b: [(a, "*", b)],
        (
            "{p} [has|buys|finds|*picks] " + groups("{0}", "{1}") + ". " + NOW,
            "There are " + groups("{0}", "{1}") + "[| on the table]. " + THERE,
            "[There are {0} {x}s|{p} has {0} {x}s|*{q} owns {0} {x}s]. [Each {x} holds {1} {t}|There are {1} {t} in "
            "each|*Each has {1} {t}]. " + THERE,
            "{0} friends [have|buy|find|*pick] {1} {t} each. " + BOTH,
        ),
    ),
    "share": Kind(
        lambda r: ((b := r.randint(2, 12)) * r.randint(2, 12), b),
        lambda a, b: [(a, "/", b)],
        (
            share("{1}", "{0} {t}") + EACH,
            HAS + share("{1}", "them") + EACH,
            "[{p} puts {0} {t} into {1} {x}s|{0} {t} go into {1} {x}s|*{q} fills {1} {x}s with {0} {t}], the same "
            "number in each. How many {t} [are in each {x}|does each {x} hold|are in each|*are in one {x}]?",
        ),
    ),
}

TWO_STEPS = {
    "times_add": Kind(
        lambda r: (r.randint(2, 60), r.randint(2, 9), r.randint(2, 12)),
        lambda a, b, c: [(b, "*", c), (a, "+", b * c)],
        (
            HAS + "[{p} buys|{p} gets|{q} gives {p}|{p} finds|*{p} wins] " + groups("{1}", "{2}") + ". " + NOW,
            "There are {0} {t} on the table and " + groups("{1}", "{2}") + ". " + THERE,
            "{p} [has|buys|finds] " + groups("{1}", "{2}") + ". {q} has {0} {t}. " + BOTH,
            HAS
            + (
                "[{1} friends give {p} {2} {t} each|{p} gets {2} {t} from each of {1} friends|*{1} friends bring {2} "
                "{t} each]. "
            )
            + NOW,
        ),
    ),
    "times_sub": Kind(
        _times_sub,
        lambda a, b, c: [(a, "*", b), (a * b, "-", c)],
        (
            "{p} [has|buys|finds|*picks] " + groups("{0}", "{1}") + ". [Then |]" + lose("{2}") + ". " + LEFT,
            "There are "
            + groups("{0}", "{1}")
            + ". {p} [takes out|takes|*takes away] {2} {t}. How many {t} are left[| in all| now]?",
            "{0} friends [have|buy|find|*pick] {1} {t} each. They [lose|sell|give away|*drop] {2}. "
            "How many {t} do they have [left|now|*left in all]?",
        ),
    ),
    "add_sub": Kind(
        lambda r: (r.randint(5, 90), (b := r.randint(5, 90)), r.randint(2, b)),
        lambda a, b, c: [(a, "+", b), (a + b, "-", c)],
        (
            HAS + gain("{1}") + ". Then " + lose("{2}") + ". " + LEFT,
            IN_BOX
            + (
                "[{p} puts in {1} more|{q} adds {1} {t}|*{p} puts {1} {t} in as well] and [{q} takes out {2}|{q} "
                "takes {2} of them]. "
            )
            + IN_IT,
            "{p} [has|finds|buys|*picks] {0} {t} and {q} {1}. They [lose|sell|give away|*drop] {2}. "
            "How many {t} do they have [left|now|*left in all]?",
        ),
    ),
    "add_share": Kind(
        _add_share,
        lambda a, b, c: [(a, "+", b), (a + b, "/", c)],
        (
            HAS + gain("{1}") + ". " + share("{2}", "all {t}") + EACH,
            "{p} [has|finds|buys|*picks] {0} {t} and {q} {1}. " + share("{2}", "all of them") + EACH,
            "{p} [has|finds|buys|*picks] {0} {t} and {q} {1}. They put all {t} into {2} {x}s, the same number in each. "
            "How many {t} [are in each {x}|does each {x} hold|are in each|*are in one {x}]?",
        ),
    ),
    "share_sub": Kind(
        _share_sub,
        lambda a, b, c: [(a, "/", b), (a // b, "-", c)],
        (
            share("{1}", "{0} {t}")
            + (
                "One friend [loses {2}|gives {2} to {q}|sells {2}|*drops {2}]. How many {t} [does this friend have "
                "left|has this friend left|*does this one keep]?"
            ),
            "[{p} puts {0} {t} into {1} {x}s|{0} {t} go into {1} {x}s|*{q} fills {1} {x}s with {0} {t}], the same "
            "number in each. {q} takes {2} [out of|from] one {x}. How many {t} [are left in it|are in this {x} "
            "now|*does this {x} keep]?",
        ),
    ),
    "more_total": Kind(
        lambda r: (r.randint(2, 70), r.randint(2, 50)),
        lambda a, b: [(a, "+", b), (a, "+", a + b)],
        (
            "{p} [has|finds|buys|*picks] {0} {t}[.| and] {q} [has|finds|buys|*picks] {1} [more|more {t}] than {p}. "
            + BOTH,
            "[There are {0} {t} in the {x}|The {x} holds {0} {t}|*The {x} has {0} {t} in it]. The {y} holds {1} "
            "more[| than that| {t}]. " + THERE,
        ),
    ),
    "fold_total": Kind(
        lambda r: (r.randint(2, 20), r.randint(2, 8)),
        lambda a, b: [(a, "*", b), (a, "+", a * b)],
        (
            "{p} [has|finds|buys|*picks] {0} {t}[.| and] {q} [has|finds|buys|*picks] {1} times as many[| {t}| as {p}]. "
            + BOTH,
            "[There are {0} {t} in the {x}|The {x} holds {0} {t}|*The {x} has {0} {t} in it]. The {y} holds {1} times "
            "as many[| {t}]. " + THERE,
        ),
    ),
}

THREE_STEPS = {
    "add_add_sub": Kind(
        lambda r: (r.randint(3, 60), r.randint(3, 60), r.randint(3, 60), r.randint(2, 9)),
        lambda a, b, c, d: [(a, "+", b), (a + b, "+", c), (a + b + c, "-", d)],
        (
            HAS + "{p} [buys|finds|gets|*wins] {1} on Monday and {2} on Friday. Then " + lose("{3}") + ". " + LEFT,
            "{p} [has|finds|buys|*picks] {0} {t}, {q} {1} and a friend {2}. They [lose|sell|give away|*drop] {3}. "
            "How many {t} do they have [left|now|*left in all]?",
        ),
    ),
    "two_groups": Kind(
        lambda r: (r.randint(2, 9), r.randint(2, 10), r.randint(2, 9), r.randint(2, 10)),
        lambda a, b, c, d: [(a, "*", b), (c, "*", d), (a * b, "+", c * d)],
        (
            "{p} [has|buys|finds|*picks] " + groups("{0}", "{1}") + " and " + groups("{2}", "{3}", "{y}") + ". " + NOW,
            "{p} has " + groups("{0}", "{1}") + ". {q} has " + groups("{2}", "{3}", "{y}") + ". " + BOTH,
        ),
    ),
    "times_sub_add": Kind(
        lambda r: (*_times_sub(r), r.randint(2, 50)),
        lambda a, b, c, d: [(a, "*", b), (a * b, "-", c), (a * b - c, "+", d)],
        (
            "{p} [has|buys|finds|*picks] "
            + groups("{0}", "{1}")
            + ". Then "
            + lose("{2}")
            + ". Later "
            + gain("{3}")
            + ". "
            + NOW,
        ),
    ),
}

KINDS: dict[str, Kind] = {**ONE_STEP, **TWO_STEPS, **THREE_STEPS}
