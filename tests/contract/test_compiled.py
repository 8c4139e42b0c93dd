"""torch.compile follows every page. Every registered variant through every check of `lora_lite.testing`."""

from __future__ import annotations

from lora_lite import testing
from methods import OF_EACH_KIND
from samples import cases


@cases("compiled", (*OF_EACH_KIND, "vera", "hira", "fourierft", "molora", "prompt_tuning", "bottleneck"))
def test_every_variant(name, case):
    assert testing.run_check(name, case)
