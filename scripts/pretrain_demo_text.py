"""What the bundled base read: documentation that comes with Python, and generated arithmetic statements."""

from __future__ import annotations

import ast
import random
import sysconfig
from pathlib import Path

NAMES = (
    "box cup jar bag tin pot row shelf tray top left right red blue green a b c d x y z k m n p q apples books pens "
    "coins cards cookies stamps shells marbles stickers eggs oranges flowers candles buttons balloons pencils toys "
    "cakes stones plums beads Tom Mia Ann Ben Sam Lily Max Eva Leo Nina Omar Zoe Ravi Kim Jack Rosa"
).split()


def prose() -> list[str]:
    """Paragraphs of the documentation that ships with Python, in a fixed order."""
    from pydoc_data import topics

    texts = [topics.topics[key] for key in sorted(topics.topics)]
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        texts += [doc for n in nodes if (doc := ast.get_docstring(n)) and len(doc) > 60]
    return [t for t in texts if t.isascii()]


def equation(rng: random.Random) -> tuple[str, int]:
    """One statement such as `14 + 8 = 22`, and its value. Values stay between 0 and 199."""
    kind = rng.choices("+-*/", (4, 4, 3, 2))[0]
    if kind == "+":
        b = rng.randint(0, 99)
        a = rng.randint(0, 199 - b) if rng.random() < 0.4 else rng.randint(0, 99)
        return f"{a} + {b} = {a + b}", a + b
    if kind == "-":
        a = rng.randint(0, 199) if rng.random() < 0.5 else rng.randint(0, 99)
        b = rng.randint(0, a)
        return f"{a} - {b} = {a - b}", a - b
    a, b = rng.randint(1, 12), rng.randint(1, 15)
    if rng.random() < 0.5:
        a, b = b, a
    return (f"{a} * {b} = {a * b}", a * b) if kind == "*" else (f"{a * b} / {a} = {b}", b)


def small(rng: random.Random) -> int:
    return rng.randint(2, 60) if rng.random() < 0.5 else rng.randint(2, 15)


def combine(a: int, b: int, rng: random.Random) -> tuple[str, int] | None:
    """`a op b = c` for a random operation that stays within 0..199, or None."""
    kind = rng.choice("++--*/")
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else -1}[kind]
    return (f"{a} {kind} {b} = {value}", value) if 0 <= value <= 199 else None


GAIN = "gets finds buys receives picks collects makes wins adds".split()
LOSE = "loses gives sells eats uses drops spends takes".split()
GROUP = "bag box jar tin tray pot row shelf pack basket".split()


def plural(text: str) -> str:
    return text.replace("boxs", "boxes").replace("shelfs", "shelves")


def phrase(rng: random.Random) -> str:
    """One operation said in words, then as an equation: `Mia gets 5 more: 9 + 5 = 14.`"""
    who, other = rng.sample(NAMES[-16:], 2)
    thing, group = rng.choice(NAMES[26:-16]), rng.choice(GROUP)
    form = rng.randrange(9)
    if form == 0:
        a, b = rng.randint(2, 90), rng.randint(2, 90)
        more = rng.choice([f"{b} more", f"{b} {thing}", f"{b} more {thing}", f"{b} from {other}"])
        return f"{who} with {a} {thing} {rng.choice(GAIN)} {more}: {a} + {b} = {a + b}."
    if form == 1:
        a = rng.randint(5, 150)
        b = rng.randint(1, a)
        less = rng.choice([f"{b}", f"{b} of them", f"{b} {thing}", f"{b} to {other}", f"away {b}", f"out {b}"])
        return f"{who} with {a} {thing} {rng.choice(LOSE)} {less}: {a} - {b} = {a - b}" + rng.choice([".", " left."])
    a, b = rng.randint(2, 12), rng.randint(2, 15)
    if form == 2:
        return plural(
            rng.choice(
                [
                    f"{a} {group}s with {b} {thing} each: {a} * {b} = {a * b}.",
                    f"{a} {group}s, {b} {thing} in each {group}: {a} * {b} = {a * b} {thing}.",
                    f"{b} {thing} in each of {a} {group}s: {a} * {b} = {a * b}.",
                    f"each {group} holds {b}, {a} {group}s hold {a} * {b} = {a * b}.",
                ]
            )
        )
    if form == 3:
        return plural(
            rng.choice(
                [
                    f"{a * b} {thing} shared equally by {a}: {a * b} / {a} = {b} each.",
                    f"{a * b} {thing} split equally into {a} {group}s: {a * b} / {a} = {b}.",
                    f"{a} friends share {a * b} {thing}: {a * b} / {a} = {b} each.",
                ]
            )
        )
    if form == 4:
        a, b = rng.randint(2, 60), rng.randint(2, 60)
        return rng.choice(
            [
                f"{a} {thing} and {b} {thing} together: {a} + {b} = {a + b}.",
                f"{who} has {a} and {other} has {b}, in all {a} + {b} = {a + b}.",
                f"{b} more than {a}: {a} + {b} = {a + b}.",
                f"the sum of {a} and {b}: {a} + {b} = {a + b}.",
            ]
        )
    if form == 5:
        a = rng.randint(3, 99)
        b = rng.randint(1, a)
        return rng.choice(
            [
                f"{b} less than {a}: {a} - {b} = {a - b}.",
                f"{who} has {a}, {other} has {b}: {who} has {a} - {b} = {a - b} more.",
                f"from {b} to {a}: {a} - {b} = {a - b}.",
                f"{a} less {b}: {a} - {b} = {a - b}.",
            ]
        )
    if form == 6:
        return rng.choice(
            [
                f"twice {b}: 2 * {b} = {2 * b}.",
                f"half of {2 * b}: {2 * b} / 2 = {b}.",
                f"{a} times {b}: {a} * {b} = {a * b}.",
            ]
        )
    if form == 7:
        a, b, c = rng.randint(2, 60), rng.randint(2, 60), rng.randint(2, 60)
        return f"{a}, {b} and {c} add up: {a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}."
    verb = rng.choice(["has", "holds", "keeps", "counts"])
    return plural(f"{who} {verb} {a} {thing} and {b} {group}s. {thing}: {a}. {group}s: {b}.")


def statement(rng: random.Random) -> str:
    """One line of arithmetic: plain, in words, chained, or about named quantities that are looked up again."""
    form = rng.random()
    if rng.random() < 0.35:
        return phrase(rng)
    if form < 0.35:
        return ". ".join(equation(rng)[0] for _ in range(rng.randint(1, 3))) + "."
    if form < 0.5:
        text, value = equation(rng)
        parts = [text]
        for _ in range(rng.randint(1, 2)):
            n = small(rng)
            left, right = (value, n) if rng.random() < 0.7 else (n, value)
            if (step := combine(left, right, rng)) is None:
                break
            parts.append(step[0])
            value = step[1]
        return ". ".join(parts) + f". So {value}."
    names = rng.sample(NAMES, rng.randint(2, 4))
    values = {n: small(rng) for n in names}
    intro = rng.choice(["{} = {}", "{} is {}", "the {} has {}", "{}: {}", "there are {1} in the {0}", "{} holds {}"])
    facts = (rng.choice([". ", ", ", "; "])).join(intro.format(n, v) for n, v in values.items()) + "."
    if form < 0.62:
        asked = rng.choice(names)
        return f"{facts} {asked}? {values[asked]}."
    for _ in range(20):
        p, q = rng.sample(names, 2)
        first = combine(values[p], values[q], rng)
        if first is None:
            continue
        kind = first[0].split()[1]
        word = {
            "+": rng.choice(["plus", "and", "with"]),
            "-": rng.choice(["minus", "less", "without"]),
            "*": "times",
            "/": "by",
        }[kind]
        text = f"{facts} {p} {word} {q}: {first[0]}."
        rest = [n for n in names if n not in (p, q)]
        if rest and rng.random() < 0.6:
            n = rng.choice(rest)
            left, right = (first[1], values[n]) if rng.random() < 0.7 else (values[n], first[1])
            second = combine(left, right, rng)
            if second is not None:
                kind = second[0].split()[1]
                word = {"+": "plus", "-": "minus", "*": "times", "/": "by"}[kind]
                order = f"then {word} {n}" if left == first[1] else f"then {n} {word} that"
                text = text[:-1] + f", {order}: {second[0]}."
        return text
    return facts
