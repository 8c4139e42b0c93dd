"""Progress of long work: every item comes out, silent while it is quick."""

from __future__ import annotations

import pytest

from lora_lite.runtime import progress


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock finds a minute gone."""
    now = iter(range(0, 10_000, 60))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))


def test_quick_work_is_silent(capfd):
    assert list(progress.track("abc", "work")) == ["a", "b", "c"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("clock")
def test_slow_work_says_what_is_left_and_loses_nothing(capfd):
    assert list(progress.track("abcd", "merge")) == ["a", "b", "c", "d"]
    out, err = capfd.readouterr()
    assert out == "" and err.splitlines() == [
        f"merge [{'#' * 6:<24}] 1/4, 360 s left",
        f"merge [{'#' * 12:<24}] 2/4, 180 s left",
        f"merge [{'#' * 18:<24}] 3/4, 80 s left",
    ]
