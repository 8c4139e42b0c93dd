"""wordmath: generated grade-school word problems with a worked solution and `#### 42` at the end.

The shape is that of MetaMathQA training and GSM8K testing. Train, validation and test differ in the sentences (templates) and in the
numbers (each tuple of operands belongs to one split by a hash), so a right answer on the test split was not seen in training.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
PEOPLE = "Tom Mia Ann Ben Sam Lily Max Eva Leo Nina Omar Zoe Ravi Kim Jack Rosa".split()
THINGS = (
    "apples books pens coins cards cookies stamps shells marbles stickers eggs oranges flowers candles buttons balloons pencils toys "
    "cakes stones plums beads"
).split()
BOXES = "box bag jar tin tray pot".split()


@dataclass(frozen=True)
class Problem:
    """One problem. `prompt + completion` is the training text; `answer` is the number after `####`."""

    prompt: str
    completion: str
    answer: int
    kind: str
    numbers: tuple[int, ...]
    template: str


@dataclass(frozen=True)
class Kind:
    """One structure of operations: how numbers are drawn, how the solution runs, and its wordings per split."""

    draw: Callable[[random.Random], tuple[int, ...]]
    solve: Callable[..., list[tuple[int, str, int]]]
    """numbers -> the steps (a, op, b) in order."""
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


# {p} {q}: people, {t}: things, {x}: a container, {0} {1} {2}: the numbers
KINDS: dict[str, Kind] = {
    "add": Kind(
        lambda r: (r.randint(2, 90), r.randint(2, 90)),
        lambda a, b: [(a, "+", b)],
        (
            "{p} has {0} {t}. {q} gives {p} {1} more. How many {t} does {p} have now?",
            "{p} has {0} {t} and {q} has {1} {t}. How many {t} do they have together?",
            "There are {0} {t} in a {x}. {p} puts in {1} more. How many {t} are in the {x} now?",
            "{p} finds {0} {t} in the morning and {1} {t} in the evening. How many {t} does {p} find in all?",
        ),
        ("{p} buys {0} {t}, then buys {1} more. How many {t} does {p} have in all?",),
        (
            "A {x} holds {0} {t}. {p} adds {1} {t} to it. How many {t} does the {x} hold now?",
            "{p} picks {0} {t} and {q} picks {1} {t}. How many {t} do they pick together?",
        ),
    ),
    "sub": Kind(
        lambda r: (a := r.randint(10, 120), r.randint(2, a - 1)),
        lambda a, b: [(a, "-", b)],
        (
            "{p} has {0} {t}. {p} gives {1} to {q}. How many {t} does {p} have left?",
            "There are {0} {t} in a {x}. {p} takes out {1}. How many {t} are left in the {x}?",
            "{p} had {0} {t} and lost {1} of them. How many {t} are left?",
            "{p} has {0} {t}. {q} has {1} {t}. How many more {t} does {p} have than {q}?",
        ),
        ("{p} had {0} {t} and sold {1} of them. How many {t} does {p} have left?",),
        (
            "A {x} holds {0} {t}. {q} takes {1} of them. How many {t} are left in it?",
            "{p} has {0} {t} and gives away {1}. How many {t} are left?",
        ),
    ),
    "times": Kind(
        lambda r: (r.randint(2, 12), r.randint(2, 15)),
        lambda a, b: [(a, "*", b)],
        (
            "{p} has {0} {x}s with {1} {t} in each {x}. How many {t} does {p} have?",
            "There are {0} {x}s. Each {x} holds {1} {t}. How many {t} are there in all?",
            "{p} buys {0} {x}s of {t}. There are {1} {t} in each. How many {t} does {p} buy?",
        ),
        ("{p} fills {0} {x}s with {1} {t} each. How many {t} are that in all?",),
        (
            "Each {x} of {p} has {1} {t}. {p} has {0} {x}s. How many {t} does {p} have in all?",
            "{p} puts {1} {t} in each of {0} {x}s. How many {t} are there?",
        ),
    ),
    "share": Kind(
        lambda r: ((b := r.randint(2, 12)) * r.randint(2, 12), b),
        lambda a, b: [(a, "/", b)],
        (
            "{p} shares {0} {t} equally among {1} friends. How many {t} does each friend get?",
            "{p} puts {0} {t} into {1} {x}s, the same number in each {x}. How many {t} are in each {x}?",
            "{0} {t} are split equally into {1} {x}s. How many {t} are in each?",
        ),
        ("{1} friends share {0} {t} equally. How many {t} does each get?",),
        ("{p} splits {0} {t} equally among {1} {x}s. How many {t} are in each {x}?",),
    ),
    "times_add": Kind(
        lambda r: (r.randint(2, 60), r.randint(2, 9), r.randint(2, 12)),
        lambda a, b, c: [(b, "*", c), (a, "+", b * c)],
        (
            "{p} has {0} {t}. {p} buys {1} {x}s with {2} {t} in each {x}. How many {t} does {p} have now?",
            "{p} has {0} {t} and gets {1} {x}s of {t} from {q}. Each {x} holds {2} {t}. How many {t} does {p} have now?",
            "There are {0} {t} on the table and {1} {x}s with {2} {t} each. How many {t} are there in all?",
        ),
        ("{p} finds {0} {t}, then buys {1} {x}s of {2} {t} each. How many {t} does {p} have in all?",),
        ("{q} gives {p} {1} {x}s with {2} {t} in each. {p} had {0} {t} before. How many {t} does {p} have now?",),
    ),
    "times_sub": Kind(
        lambda r: ((a := r.randint(3, 12)), (b := r.randint(3, 12)), r.randint(2, a * b - 1)),
        lambda a, b, c: [(a, "*", b), (a * b, "-", c)],
        (
            "{p} has {0} {x}s with {1} {t} in each {x}. {p} gives {2} {t} to {q}. How many {t} does {p} have left?",
            "There are {0} {x}s of {t}, {1} in each. {p} takes out {2} {t}. How many {t} are left?",
            "{p} buys {0} {x}s with {1} {t} each and loses {2} {t}. How many {t} are left?",
        ),
        ("{p} fills {0} {x}s with {1} {t} each and sells {2} {t}. How many {t} does {p} have left?",),
        ("Each of {0} {x}s holds {1} {t}. {q} takes {2} {t}. How many {t} are left in all?",),
    ),
    "add_sub": Kind(
        lambda r: (r.randint(5, 90), (b := r.randint(5, 90)), r.randint(2, b)),
        lambda a, b, c: [(a, "+", b), (a + b, "-", c)],
        (
            "{p} has {0} {t}. {q} gives {p} {1} more. Then {p} loses {2}. How many {t} does {p} have now?",
            "{p} finds {0} {t} and {q} finds {1}. They give away {2}. How many {t} do they have left together?",
            "There are {0} {t} in a {x}. {p} puts in {1} more and {q} takes out {2}. How many {t} are in the {x} now?",
        ),
        ("{p} buys {0} {t}, then {1} more, and sells {2}. How many {t} are left?",),
        ("A {x} holds {0} {t}. {q} adds {1} {t} and {p} takes {2}. How many {t} does it hold now?",),
    ),
    "add_share": Kind(
        lambda r: (lambda n, c: (a := r.randint(2, n * c - 2), n * c - a, n))(r.randint(2, 9), r.randint(3, 12)),
        lambda a, b, c: [(a, "+", b), (a + b, "/", c)],
        (
            "{p} has {0} {t} and {q} has {1}. They share all of them equally among {2} friends. How many {t} does each friend get?",
            "{p} picks {0} {t}, then {1} more, and puts them into {2} {x}s, the same number in each. How many {t} are in each {x}?",
        ),
        ("{p} has {0} {t} and buys {1} more. {2} friends share them equally. How many {t} does each get?",),
        (
            "{p} finds {0} {t} and {q} finds {1}. They split all {t} equally into {2} {x}s. How many {t} are in each {x}?",
        ),
    ),
    "add_add_sub": Kind(
        lambda r: (r.randint(3, 60), r.randint(3, 60), r.randint(3, 60), r.randint(2, 9)),
        lambda a, b, c, d: [(a, "+", b), (a + b, "+", c), (a + b + c, "-", d)],
        (
            "{p} has {0} {t}. {p} buys {1} on Monday and {2} on Friday, and gives {3} to {q}. How many {t} does {p} have now?",
            "There are {0} {t} in the red {x}, {1} in the blue {x} and {2} in the green {x}. {p} takes {3} of them. How many {t} are left in all?",
        ),
        ("{p} picks {0} {t}, {q} picks {1}, and a friend picks {2}. They lose {3}. How many {t} are left?",),
        (
            "{p} has {0} {t}, {q} has {1} and a friend has {2}. They give away {3}. How many {t} do they have left together?",
        ),
    ),
}
_VALUE: dict[str, Callable[[int, int], int]] = {
    "+": int.__add__,
    "-": int.__sub__,
    "*": int.__mul__,
    "/": int.__floordiv__,
}


def split_of(kind: str, numbers: Sequence[int]) -> Split:
    """The one split that may use these numbers in this kind of problem: 80 % train, 10 % validation, 10 % test."""
    digest = hashlib.blake2b(f"{kind}:{','.join(map(str, numbers))}".encode(), digest_size=4).digest()
    bucket = int.from_bytes(digest, "little") % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def solution(kind: str, numbers: Sequence[int]) -> tuple[str, int]:
    """The worked solution of `numbers`, and its last value."""
    parts, value = [], 0
    for a, op, b in KINDS[kind].solve(*numbers):
        value = _VALUE[op](a, b)
        parts.append(f"{a} {op} {b} = {value}.")
    return " ".join(parts), value


def generate(split: Split, n: int, seed: int = 0) -> list[Problem]:
    """n problems of one split, all different; the same (split, n, seed) gives the same list.

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
    rng = random.Random(f"wordmath-{split}-{seed}")
    seen: set[str] = set()
    problems: list[Problem] = []
    while len(problems) < n:
        kind = rng.choice(list(KINDS))
        numbers = KINDS[kind].draw(rng)
        text, value = solution(kind, numbers)
        if split_of(kind, numbers) != split or not 0 <= value <= 199:
            continue
        template = rng.choice(getattr(KINDS[kind], split))
        p, q = rng.sample(PEOPLE, 2)
        question = template.format(*numbers, p=p, q=q, t=rng.choice(THINGS), x=rng.choice(BOXES)).replace(
            "boxs", "boxes"
        )
        if question not in seen:
            seen.add(question)
            problems.append(
                Problem(f"Q: {question}\nA:", f" {text}\n#### {value}", value, kind, tuple(numbers), template)
            )
    return problems


def extract_answer(text: str) -> int | None:
    """The number after the first `####`, or None."""
    found = re.search(r"####\s*(-?\d+)(?!\d)", text)
    return int(found.group(1)) if found else None


def score(completions: Sequence[str], problems: Sequence[Problem]) -> float:
    """Share of problems whose final number is exactly right."""
    if len(completions) != len(problems):
        raise ValueError(f"{len(completions)} completions for {len(problems)} problems.")
    return sum(extract_answer(c) == p.answer for c, p in zip(completions, problems, strict=True)) / max(
        1, len(problems)
    )
