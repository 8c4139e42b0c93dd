"""The kinds of problem in wordmath: how numbers are drawn, which operations solve them, and their wordings per split."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

Numbers = tuple[int, ...]
Step = tuple[int, str, int]


@dataclass(frozen=True)
class Kind:
    """One structure of operations. A wording has {p} {q} for people, {t} for things, {x} {y} for containers, {0}.. for numbers."""

    draw: Callable[[random.Random], Numbers]
    solve: Callable[..., list[Step]]
    """numbers -> the steps (a, op, b) in order."""
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def _add_share(r: random.Random) -> Numbers:
    share, friends = r.randint(3, 12), r.randint(2, 9)
    a = r.randint(2, share * friends - 2)
    return a, share * friends - a, friends


def _share_sub(r: random.Random) -> Numbers:
    share, friends = r.randint(3, 15), r.randint(2, 9)
    return share * friends, friends, r.randint(1, share - 1)


def _times_sub(r: random.Random) -> Numbers:
    a, b = r.randint(3, 12), r.randint(3, 12)
    return a, b, r.randint(2, a * b - 1)


ONE_STEP = {
    "add": Kind(
        lambda r: (r.randint(2, 90), r.randint(2, 90)),
        lambda a, b: [(a, "+", b)],
        (
            "{p} has {0} {t}. {q} gives {p} {1} more. How many {t} does {p} have now?",
            "{p} has {0} {t} and {q} has {1} {t}. How many {t} do they have together?",
            "There are {0} {t} in a {x}. {p} puts in {1} more. How many {t} are in the {x} now?",
            "{p} finds {0} {t} in the morning and {1} {t} in the evening. How many {t} does {p} find in all?",
            "{p} has {0} {t}. {q} has {1} more than {p}. How many {t} does {q} have?",
        ),
        ("{p} buys {0} {t}, then buys {1} more. How many {t} does {p} have in all?",),
        (
            "A {x} holds {0} {t}. {p} adds {1} {t} to it. How many {t} does the {x} hold now?",
            "{p} picks {0} {t} and {q} picks {1} {t}. How many {t} do they pick together?",
            "{q} has {1} {t} more than {p}, who has {0}. How many {t} does {q} have?",
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
            "{p} has {0} {t}. {q} has {1} less than {p}. How many {t} does {q} have?",
        ),
        ("{p} had {0} {t} and sold {1} of them. How many {t} does {p} have left?",),
        (
            "A {x} holds {0} {t}. {q} takes {1} of them. How many {t} are left in it?",
            "{p} has {0} {t} and gives away {1}. How many {t} are left?",
            "{q} has {1} {t} and {p} has {0}. How many {t} does {p} have more than {q}?",
        ),
    ),
    "times": Kind(
        lambda r: (r.randint(2, 12), r.randint(2, 15)),
        lambda a, b: [(a, "*", b)],
        (
            "{p} has {0} {x}s with {1} {t} in each {x}. How many {t} does {p} have?",
            "There are {0} {x}s. Each {x} holds {1} {t}. How many {t} are there in all?",
            "{p} buys {0} {x}s of {t}. There are {1} {t} in each. How many {t} does {p} buy?",
            "{0} friends have {1} {t} each. How many {t} do they have together?",
        ),
        ("{p} fills {0} {x}s with {1} {t} each. How many {t} are that in all?",),
        (
            "Each {x} of {p} has {1} {t}. {p} has {0} {x}s. How many {t} does {p} have in all?",
            "{p} puts {1} {t} in each of {0} {x}s. How many {t} are there?",
            "{p} and {q} have {0} {x}s of {1} {t}. How many {t} do they have together?",
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
        (
            "{p} splits {0} {t} equally among {1} {x}s. How many {t} are in each {x}?",
            "There are {1} {x}s for {0} {t}, the same number for each {x}. How many {t} does each {x} hold?",
        ),
    ),
}

TWO_STEPS = {
    "times_add": Kind(
        lambda r: (r.randint(2, 60), r.randint(2, 9), r.randint(2, 12)),
        lambda a, b, c: [(b, "*", c), (a, "+", b * c)],
        (
            "{p} has {0} {t}. {p} buys {1} {x}s with {2} {t} in each {x}. How many {t} does {p} have now?",
            "{p} has {0} {t} and gets {1} {x}s of {t} from {q}. Each {x} holds {2} {t}. How many {t} does {p} have now?",
            "There are {0} {t} on the table and {1} {x}s with {2} {t} each. How many {t} are there in all?",
            "{p} has {1} {x}s with {2} {t} each. {q} has {0} {t}. How many {t} do they have together?",
            "{1} friends give {p} {2} {t} each. {p} had {0} {t} before. How many {t} does {p} have now?",
        ),
        ("{p} finds {0} {t}, then buys {1} {x}s of {2} {t} each. How many {t} does {p} have in all?",),
        (
            "{q} gives {p} {1} {x}s with {2} {t} in each. {p} had {0} {t} before. How many {t} does {p} have now?",
            "{p} has {0} {t}. Then {1} friends give {p} {2} {t} each. How many {t} does {p} have in all?",
            "{p} picks {0} {t}. There are {1} {x}s of {2} {t} as well. How many {t} are there together?",
        ),
    ),
    "times_sub": Kind(
        _times_sub,
        lambda a, b, c: [(a, "*", b), (a * b, "-", c)],
        (
            "{p} has {0} {x}s with {1} {t} in each {x}. {p} gives {2} {t} to {q}. How many {t} does {p} have left?",
            "There are {0} {x}s of {t}, {1} in each. {p} takes out {2} {t}. How many {t} are left?",
            "{p} buys {0} {x}s with {1} {t} each and loses {2} {t}. How many {t} are left?",
            "{p} has {0} {x}s of {1} {t}. {q} has {2} {t}. How many more {t} does {p} have than {q}?",
        ),
        ("{p} fills {0} {x}s with {1} {t} each and sells {2} {t}. How many {t} does {p} have left?",),
        (
            "Each of {0} {x}s holds {1} {t}. {q} takes {2} {t}. How many {t} are left in all?",
            "{p} finds {0} {x}s with {1} {t} in each {x} and gives away {2} of the {t}. How many {t} does {p} have now?",
            "{0} friends have {1} {t} each. They lose {2} {t}. How many {t} do they have left together?",
        ),
    ),
    "add_sub": Kind(
        lambda r: (r.randint(5, 90), (b := r.randint(5, 90)), r.randint(2, b)),
        lambda a, b, c: [(a, "+", b), (a + b, "-", c)],
        (
            "{p} has {0} {t}. {q} gives {p} {1} more. Then {p} loses {2}. How many {t} does {p} have now?",
            "{p} finds {0} {t} and {q} finds {1}. They give away {2}. How many {t} do they have left together?",
            "There are {0} {t} in a {x}. {p} puts in {1} more and {q} takes out {2}. How many {t} are in the {x} now?",
            "{p} has {0} {t}. {q} has {1} more than {p} and gives {2} to {p}. How many {t} does {q} have left?",
        ),
        ("{p} buys {0} {t}, then {1} more, and sells {2}. How many {t} are left?",),
        (
            "A {x} holds {0} {t}. {q} adds {1} {t} and {p} takes {2}. How many {t} does it hold now?",
            "{p} has {0} {t} and gets {1} from {q}. Then {p} sells {2} of them. How many {t} are left?",
            "{p} and {q} have {0} and {1} {t}. They lose {2} of them. How many {t} do they have now?",
        ),
    ),
    "add_share": Kind(
        _add_share,
        lambda a, b, c: [(a, "+", b), (a + b, "/", c)],
        (
            "{p} has {0} {t} and {q} has {1}. They share all of them equally among {2} friends. How many {t} does each friend get?",
            "{p} picks {0} {t}, then {1} more, and puts them into {2} {x}s, the same number in each. How many {t} are in each {x}?",
            "There are {0} {t} in a {x}. {p} puts in {1} more. Then {2} friends share them equally. How many {t} does each get?",
        ),
        ("{p} has {0} {t} and buys {1} more. {2} friends share them equally. How many {t} does each get?",),
        (
            "{p} finds {0} {t} and {q} finds {1}. They split all {t} equally into {2} {x}s. How many {t} are in each {x}?",
            "{p} has {0} {t}. {q} gives {p} {1} more. {p} shares all {t} equally among {2} friends. How many does each friend get?",
        ),
    ),
    "share_sub": Kind(
        _share_sub,
        lambda a, b, c: [(a, "/", b), (a // b, "-", c)],
        (
            "{p} shares {0} {t} equally among {1} friends. One friend loses {2}. How many {t} does this friend have left?",
            "{0} {t} are split equally into {1} {x}s. {p} takes {2} out of one {x}. How many {t} are left in this {x}?",
            "{p} and the others are {1} friends and share {0} {t} equally. {p} gives {2} to {q}. How many {t} does {p} have left?",
        ),
        ("{p} puts {0} {t} equally into {1} {x}s and takes {2} out of one. How many {t} are left in it?",),
        (
            "{1} friends share {0} {t} equally. {q} is one of them and gives away {2}. How many {t} does {q} have left?",
            "{p} splits {0} {t} equally among {1} {x}s. {q} takes {2} from one {x}. How many {t} does this {x} hold now?",
        ),
    ),
    "more_total": Kind(
        lambda r: (r.randint(2, 70), r.randint(2, 50)),
        lambda a, b: [(a, "+", b), (a, "+", a + b)],
        (
            "{p} has {0} {t}. {q} has {1} more than {p}. How many {t} do they have together?",
            "{p} finds {0} {t} and {q} finds {1} more {t} than {p}. How many {t} do they find in all?",
            "There are {0} {t} in the {x} and {1} more than that in the {y}. How many {t} are there in all?",
        ),
        ("{p} buys {0} {t}. {q} buys {1} more than {p}. How many {t} do they buy in all?",),
        (
            "{p} picks {0} {t}. {q} picks {1} more {t} than {p}. How many {t} do they pick together?",
            "The {x} holds {0} {t}. The {y} holds {1} more. How many {t} do both hold together?",
        ),
    ),
    "fold_total": Kind(
        lambda r: (r.randint(2, 20), r.randint(2, 8)),
        lambda a, b: [(a, "*", b), (a, "+", a * b)],
        (
            "{p} has {0} {t}. {q} has {1} times as many. How many {t} do they have together?",
            "{p} finds {0} {t} and {q} finds {1} times as many {t}. How many {t} do they find in all?",
            "There are {0} {t} in the {x} and {1} times as many in the {y}. How many {t} are there in all?",
        ),
        ("{p} buys {0} {t}. {q} buys {1} times as many. How many {t} do they buy in all?",),
        (
            "{p} picks {0} {t}. {q} picks {1} times as many {t} as {p}. How many {t} do they pick together?",
            "The {x} holds {0} {t}. The {y} holds {1} times as many. How many {t} do both hold together?",
        ),
    ),
}

THREE_STEPS = {
    "add_add_sub": Kind(
        lambda r: (r.randint(3, 60), r.randint(3, 60), r.randint(3, 60), r.randint(2, 9)),
        lambda a, b, c, d: [(a, "+", b), (a + b, "+", c), (a + b + c, "-", d)],
        (
            "{p} has {0} {t}. {p} buys {1} on Monday and {2} on Friday, and gives {3} to {q}. How many {t} does {p} have now?",
            "There are {0} {t} in the red {x}, {1} in the blue {x} and {2} in the green {x}. {p} takes {3} of them. How many {t} are left in all?",
            "{p} finds {0} {t}, then {1}, then {2} more, and loses {3}. How many {t} are left?",
        ),
        ("{p} picks {0} {t}, {q} picks {1}, and a friend picks {2}. They lose {3}. How many {t} are left?",),
        (
            "{p} has {0} {t}, {q} has {1} and a friend has {2}. They give away {3}. How many {t} do they have left together?",
            "A {x} holds {0} {t}. {p} puts in {1} and {q} puts in {2}. Then {p} takes out {3}. How many {t} are in the {x} now?",
        ),
    ),
    "two_groups": Kind(
        lambda r: (r.randint(2, 9), r.randint(2, 10), r.randint(2, 9), r.randint(2, 10)),
        lambda a, b, c, d: [(a, "*", b), (c, "*", d), (a * b, "+", c * d)],
        (
            "{p} has {0} {x}s with {1} {t} each and {2} {y}s with {3} {t} each. How many {t} does {p} have in all?",
            "{p} buys {0} {x}s of {1} {t} and {q} buys {2} {x}s of {3} {t}. How many {t} do they have together?",
            "There are {0} {x}s with {1} {t} in each {x}. There are {2} {y}s with {3} {t} in each {y}. How many {t} are there?",
        ),
        ("{p} fills {0} {x}s with {1} {t} each, then {2} {y}s with {3} {t} each. How many {t} are that in all?",),
        (
            "{p} has {0} {x}s. Each holds {1} {t}. {q} has {2} {y}s. Each holds {3} {t}. How many {t} do they have in all?",
            "{0} friends have {1} {t} each and {2} others have {3} {t} each. How many {t} do they have together?",
        ),
    ),
    "times_sub_add": Kind(
        lambda r: (*_times_sub(r), r.randint(2, 50)),
        lambda a, b, c, d: [(a, "*", b), (a * b, "-", c), (a * b - c, "+", d)],
        (
            "{p} has {0} {x}s with {1} {t} in each {x}. {p} gives {2} {t} to {q} and finds {3} more. How many {t} does {p} have now?",
            "There are {0} {x}s of {t}, {1} in each. {p} takes out {2} and {q} puts in {3}. How many {t} are there now?",
            "{p} buys {0} {x}s of {1} {t}, loses {2} and gets {3} from {q}. How many {t} does {p} have in all?",
        ),
        ("{p} fills {0} {x}s with {1} {t} each, sells {2} and buys {3}. How many {t} does {p} have now?",),
        (
            "Each of {0} {x}s holds {1} {t}. {q} takes {2} {t} and adds {3}. How many {t} are there in all?",
            "{0} friends have {1} {t} each. They lose {2} {t}, then find {3} more. How many {t} do they have together?",
        ),
    ),
}

KINDS: dict[str, Kind] = {**ONE_STEP, **TWO_STEPS, **THREE_STEPS}
