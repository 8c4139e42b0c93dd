"""The models that people adapt, built tiny from their configs: the default plan attaches, every target acts and learns,
comes back from its file, merges, and leaves nothing behind. `docs/architectures.md` is this table."""

from __future__ import annotations

import re

import pytest

import lora_lite as ll
from architecture_checks import CHECKS, config
from architectures import TABLE, Architecture, build


def rows():
    for name, row in TABLE.items():
        for check in CHECKS:
            marks = [pytest.mark.slow] * (not row.quick)
            if check in row.faults:
                marks.append(pytest.mark.xfail(strict=True, reason=row.faults[check]))
            yield pytest.param(name, check, id=f"{name}-{check}", marks=marks)


@pytest.mark.parametrize(("name", "check"), [*rows()])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_architecture(name, check):
    pytest.importorskip("transformers")
    CHECKS[check](name)


def test_the_table_is_wide():
    assert len(TABLE) >= 56 and 10 <= sum(row.quick for row in TABLE.values()) <= 20
    assert len({row.cls for row in TABLE.values()}) >= 56
    assert all(set(row.faults) <= set(CHECKS) for row in TABLE.values())


def idle(row: Architecture) -> list[str]:
    """Patterns of targets that may do nothing, and match none."""
    targets = ll.plan(build(row.name), config(row.name)).targets
    return [p for p in row.conditional if not any(re.search(p, t.path) for t in targets)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [row.name for row in TABLE.values() if row.conditional])
def test_an_excuse_is_one(name):
    assert not idle(TABLE[name])
