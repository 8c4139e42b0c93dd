"""Which layers a name in adapter_config.json means."""

from __future__ import annotations

import random
import re

import pytest

import lora_lite as ll
from lora_lite.io.patterns import compiled
from lora_lite.io.peft_names import MAX_EXPRESSIONS, Matcher

PATHS = ["model.layers.1.fc", "model.layers.11.fc", "model.fc2", "model.layers.1.fc.down", "xfc"]


def hits(rule, name):
    return [path for path in PATHS if rule(name, path)]


def test_tails_and_whole_paths():
    match = Matcher(PATHS, "here")
    assert hits(match.named, ["fc"]) == ["model.layers.1.fc", "model.layers.11.fc"]
    assert hits(match.named, ["1.fc", "xfc"]) == ["model.layers.1.fc", "xfc"]
    assert hits(match.named, "fc") == [] and hits(match.named, "xfc") == ["xfc"]
    assert hits(match.named, r".*\.1\.fc") == ["model.layers.1.fc"]
    assert hits(match.named, None) == []


def test_values_of_patterns():
    match = Matcher(PATHS, "here")
    table = {"layers.1.fc": 1, r".*1\.fc": 2, "^xfc$": 3, "fc": 4}
    assert [match.value(table, path, 0) for path in PATHS] == [1, 2, 0, 0, 3]
    with pytest.raises(ll.FileError, match="must be a mapping"):
        match.value(["fc"], PATHS[0], 0)


def test_what_is_no_regular_expression_is_said():
    with pytest.raises(ll.FileError, match="'\\(' is not a regular expression"):
        Matcher(PATHS, "here").named("(", PATHS[0])


def test_the_first_pattern_that_matches_wins():
    match = Matcher(PATHS, "here")
    assert match.value({".*fc": 1, "fc": 2}, PATHS[0], 0) == 1 and match.value({"fc": 2, ".*fc": 1}, PATHS[0], 0) == 2


EXPRESSIONS = [
    r".*\.(q|v)_proj", r"model\.layers\.(1[0-9]|[2-5])\..*(up|down)_proj$", r"^(?!.*vision).*q_proj$", r"(a+)+b",
    r"(?:.*\.)?(?:^fc2$)", r"[\w.]+?\d{1,2}\.x", r".*\bq\b.*", r"a{2}|b{,3}c", r"[^.]*\.[]a]x?", r"(|a)*b", r"x\-y", "",
]  # fmt: skip
TEXTS = [
    "model.layers.1.q_proj", "model.layers.12.mlp.up_proj", "vision.q_proj", "fc2", "x.fc2", "aaab", "layers.3.x", "",
    "a.q.b", "aa", "bbc", "bbbbc", "q_proj", "a.]x", "a.ax", "b", "x-y", "model.layers.3.down_proj",
]  # fmt: skip
PIECES = ["a", "b", ".", "*", "+", "?", "|", "(", ")", "[ab]", "[^a]", "{1,2}", "^", "$", "(?:", "(?!", "(?=", r"\b"]


def test_regular_expressions_match_what_python_matches():
    r = random.Random(0)
    made = ["".join(r.choices(PIECES, k=r.randrange(1, 9))) for _ in range(3000)]
    n = 0
    for pattern, texts in [(p, TEXTS) for p in EXPRESSIONS] + [(p, ["", "a", "b", "ba", "aab", "abab"]) for p in made]:
        try:
            ours = compiled(pattern)
        except ll.FileError:
            continue
        for text in texts:
            n += 1
            assert ours(text) == bool(re.fullmatch(pattern, text)), (pattern, text)
    assert n > 2000


@pytest.mark.parametrize("pattern", [r"(a+)+!", r"([\w.]|[\w.][\w.])*!", "((a*)*)*!", "(a?){200}a{200}"])
def test_no_regular_expression_hangs(pattern):
    assert not compiled(pattern)("a" * 150)


def test_a_time_limit_over_all_patterns(monkeypatch):
    monkeypatch.setattr("lora_lite.io.peft_names.SECONDS", -1.0)
    with pytest.raises(ll.FileError, match="ran for more than"):
        Matcher(PATHS, "here").named(".*fc", PATHS[0])


@pytest.mark.parametrize("pattern", [r"(a)\1", "(?i)a", "(?<=a)b", "a{300}", "(" * 40 + ")" * 40, "a" * 3000])
def test_what_is_not_run_is_refused(pattern):
    with pytest.raises(ll.FileError, match="Write the names out|write the names out"):
        compiled(pattern)


def test_too_many_regular_expressions():
    with pytest.raises(ll.FileError, match=f"at most {MAX_EXPRESSIONS}"):
        Matcher(PATHS, "here").value({f"a+{i}": 1 for i in range(MAX_EXPRESSIONS + 1)}, PATHS[0], 0)
