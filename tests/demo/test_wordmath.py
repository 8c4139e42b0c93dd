"""wordmath: true solutions, and splits that share neither sentences nor numbers."""

from __future__ import annotations

import operator
import re

import pytest

from lora_lite.demo.wordmath import KINDS, PEOPLE, SPLITS, THINGS, extract_answer, generate, score, split_of

VALUE = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
N = {"train": 3000, "validation": 600, "test": 600}
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.")


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
    for kind in KINDS.values():
        assert not set(getattr(kind, one)) & set(getattr(kind, other))
    assert not set(PEOPLE[one]) & set(PEOPLE[other]) and not set(THINGS[one]) & set(THINGS[other])


def test_numbers_are_filed_where_their_hash_says(problems):
    assert all(split_of(p.kind, p.numbers) == split for split, rows in problems.items() for p in rows)


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
        assert not re.search(r"[{}]|boxs|  ", p.prompt)


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
