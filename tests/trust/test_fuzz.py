"""What ten minutes of atheris found on both parsers, tried again: every input loads or is refused by an error of ours,
and leaves nothing behind. `python tests/fuzz_parsers.py` searches on."""

from __future__ import annotations

import time

import pytest

from fuzz_parsers import KINDS, SLOW, Parsers, corpus


@pytest.fixture(scope="module")
def parsers(tmp_path_factory):
    return Parsers(tmp_path_factory.mktemp("parsers"))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_were_found(kind, parsers):
    mine = [data for data in corpus() if KINDS[data[0] % 4 if data else 0] == kind]
    assert mine
    for data in mine:
        start = time.process_time()
        parsers.try_it(data)
        assert time.process_time() - start < SLOW, data


def test_the_good_files_load(parsers):
    assert all(parsers.try_it(seed) for seed in parsers.seeds())


def test_a_raw_exception_and_a_trace_are_noticed(parsers, monkeypatch):
    def fails(*args, **more):
        raise KeyError("planted")

    good = parsers.seeds()[0]
    monkeypatch.setattr("lora_lite.load", fails)
    with pytest.raises(KeyError, match="planted"):
        parsers.try_it(good)
    monkeypatch.undo()
    monkeypatch.setattr("lora_lite.detach", lambda model: None)
    with pytest.raises(AssertionError):
        parsers.try_it(good)
