"""The page itself: what it hands back. Every registered variant through every check of `lora_lite.testing`."""

from __future__ import annotations

from lora_lite import testing
from samples import cases


@cases("0_page")
def test_every_variant(name, case):
    assert testing.run_check(name, case)
