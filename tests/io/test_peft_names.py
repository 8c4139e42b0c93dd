"""Which layers a name in adapter_config.json means."""

from __future__ import annotations

import pytest

import lora_lite as ll
from lora_lite.io.peft_names import Matcher

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
    with pytest.raises(ll.FileError, match="here: '\\(' is not a regular expression"):
        Matcher(PATHS, "here").named("(", PATHS[0])
