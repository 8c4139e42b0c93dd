"""wordmath: generated grade-school word problems with a worked solution and `#### 42` at the end.

The shape is that of MetaMathQA training and GSM8K testing. The splits share no template, no people, no things and no
numbers (templates and tuples of operands are dealt out by a hash). Half of the validation and test problems hold a
phrase that no training problem has; the other half combines known phrases in a new way.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from .wordmath_kinds import KINDS, expand

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
PEOPLE: dict[Split, Sequence[str]] = {
    "train": "Tom Mia Ann Ben Sam Lily Max Eva Leo Nina".split(),
    "validation": "Omar Zoe Ravi".split(),
    "test": "Kim Jack Rosa".split(),
}
THINGS: dict[Split, Sequence[str]] = {
    "train": (
        "apples books pens coins cards cookies stamps shells marbles stickers eggs oranges flowers candles".split()
    ),
    "validation": "buttons balloons pencils toys".split(),
    "test": "cakes stones plums beads".split(),
}
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
    new_phrase: bool
    """The template holds a phrase that no training template has (half of validation and test)."""


_VALUE: dict[str, Callable[[int, int], int]] = {
    "+": int.__add__,
    "-": int.__sub__,
    "*": int.__mul__,
    "/": int.__floordiv__,
}


def _bucket(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") % 10


def split_of(kind: str, numbers: Sequence[int]) -> Split:
    """The one split that may use these numbers in this kind of problem: 80 % train, 10 % validation, 10 % test."""
    bucket = _bucket(f"{kind}:{','.join(map(str, numbers))}")
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


@lru_cache
def templates(split: Split) -> dict[str, dict[bool, list[list[str]]]]:
    """kind -> whether a phrase is new to training -> the templates of this split, wording by wording."""
    found: dict[str, dict[bool, list[list[str]]]] = {}
    for name, kind in KINDS.items():
        sentences = [expand(wording) for wording in kind.wordings]
        known = {text for wording in sentences for text, new in wording if not new}
        found[name] = {
            new: [
                part
                for wording in sentences
                if (
                    part := sorted(
                        {text for text, _ in wording if (text not in known) == new and _belongs(text, new) == split}
                    )
                )
            ]
            for new in (False, True)
        }
    return found


def _belongs(template: str, new: bool) -> Split:
    bucket = _bucket(template)
    if new:
        return "validation" if bucket < 5 else "test"
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
    pool = templates(split)
    seen: set[str] = set()
    problems: list[Problem] = []
    while len(problems) < n:
        kind = rng.choice(list(KINDS))
        numbers = KINDS[kind].draw(rng)
        text, value = solution(kind, numbers)
        if split_of(kind, numbers) != split:
            continue
        new = split != "train" and rng.random() < 0.5
        template = rng.choice(rng.choice(pool[kind][new]))
        p, q = rng.sample(PEOPLE[split], 2)
        x, y = rng.sample(BOXES, 2)
        question = template.format(*numbers, p=p, q=q, t=rng.choice(THINGS[split]), x=x, y=y).replace("boxs", "boxes")
        if question not in seen:
            seen.add(question)
            prompt, completion = f"Q: {question}\nA:", f" {text}\n#### {value}"
            problems.append(Problem(prompt, completion, value, kind, tuple(numbers), template, new))
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
