"""wordmath: true solutions, and splits that share neither sentences nor numbers."""

from __future__ import annotations

import operator
import re

import pytest

from lora_lite.demo.wordmath import KINDS, PEOPLE, SPLITS, THINGS, extract_answer, generate, score, split_of, templates
from lora_lite.demo.wordmath_kinds import expand

VALUE = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
N = {"train": 3000, "validation": 600, "test": 600}
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.")


def wordings_of_all():
    return [w for kind in KINDS.values() for w in kind.wordings]


def wordings(split):
    return {text for kind in templates(split).values() for parts in kind.values() for part in parts for text in part}


@pytest.fixture(scope="module")
def problems():
    return {split: generate(split, N[split], seed=3) for split in SPLITS}


def test_same_seed_same_problems_and_another_seed_others(problems):
    assert generate("test", N["test"], seed=3) == problems["test"]
    other = {p.prompt for p in generate("test", N["test"], seed=4)}
    assert len(other & {p.prompt for p in problems["test"]}) < N["test"] / 10


def test_a_longer_list_begins_with_the_shorter(problems):
    assert generate("train", 50, seed=3) == problems["train"][:50]


def test_every_problem_is_new_within_its_split(problems):
    assert all(len({p.prompt for p in rows}) == N[split] for split, rows in problems.items())


@pytest.mark.parametrize(("one", "other"), [("train", "validation"), ("train", "test"), ("validation", "test")])
def test_splits_share_no_template_and_no_numbers(problems, one, other):
    assert not {p.template for p in problems[one]} & {p.template for p in problems[other]}
    assert not {(p.kind, p.numbers) for p in problems[one]} & {(p.kind, p.numbers) for p in problems[other]}
    assert not wordings(one) & wordings(other)
    assert not set(PEOPLE[one]) & set(PEOPLE[other]) and not set(THINGS[one]) & set(THINGS[other])


def test_numbers_are_filed_where_their_hash_says(problems):
    assert all(split_of(p.kind, p.numbers) == split for split, rows in problems.items() for p in rows)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_half_of_the_held_out_problems_hold_a_phrase_that_no_training_template_has(problems, split):
    kept = {phrase[1:] for w in wordings_of_all() for phrase in re.findall(r"(?<=[\[|])\*[^|\]]+", w)}
    assert len(kept) > 30
    share = sum(p.new_phrase for p in problems[split]) / N[split]
    assert 0.4 < share < 0.6
    for p in problems[split]:
        assert not p.new_phrase or any(phrase in p.template for phrase in kept)
    assert not any(p.new_phrase for p in problems["train"])
    starred = {text for kind in KINDS.values() for w in kind.wordings for text, new in expand(w) if new}
    plain = {text for kind in KINDS.values() for w in kind.wordings for text, new in expand(w) if not new}
    assert not wordings("train") & (starred - plain)


def test_expand():
    assert expand("a [b|*c] d[|!]") == [("a b d", False), ("a b d!", False), ("a c d", True), ("a c d!", True)]


def test_every_split_has_every_kind_and_one_to_three_steps(problems):
    for rows in problems.values():
        assert {p.kind for p in rows} == set(KINDS)
        assert {len(EQUATION.findall(p.completion)) for p in rows} == {1, 2, 3}


def test_each_equation_is_true_and_the_last_is_the_answer(problems):
    for p in (p for rows in problems.values() for p in rows):
        steps, _, final = p.completion.partition("\n#### ")
        equations = EQUATION.findall(steps)
        assert " " + " ".join(f"{a} {op} {b} = {c}." for a, op, b, c in equations) == steps
        for a, op, b, c in equations:
            assert VALUE[op](int(a), int(b)) == int(c), p
        assert int(final) == int(equations[-1][3]) == p.answer
        assert 0 <= p.answer <= 199


def test_each_operand_stands_in_the_question_or_was_worked_out_before(problems):
    for p in (p for rows in problems.values() for p in rows):
        known = set(re.findall(r"\d+", p.prompt))
        assert known == {str(n) for n in p.numbers}
        for a, _, b, c in EQUATION.findall(p.completion):
            assert {a, b} <= known, p
            known.add(c)
            assert 0 <= int(c) <= 199


def test_prompts_read_well(problems):
    for p in (p for rows in problems.values() for p in rows):
        assert p.prompt.startswith("Q: ") and p.prompt.endswith("?\nA:")
        assert not re.search(r"[][{}*|]|boxs|  | [.,?]|\.\.", p.prompt)
        assert re.fullmatch(r"Q: ([A-Z0-9][^.?]*\. )+[A-Z][^.?]*\?\nA:", p.prompt) or p.prompt.count(".") == 0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 3 * 5 = 15.\n#### 15", 15),
        ("#### -4 and more", -4),
        ("####7", 7),
        ("#### 12\n#### 13", 12),
        (" 3 * 5 = 15.", None),
        ("#### many", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_score_counts_exact_matches(problems):
    some = problems["test"][:4]
    said = [p.completion for p in some[:2]] + [f"#### {some[2].answer + 1}", "no number"]
    assert score(said, some) == 0.5
    with pytest.raises(ValueError, match="3 completions for 4"):
        score(said[:3], some)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="dev"):
        generate("dev", 1)
