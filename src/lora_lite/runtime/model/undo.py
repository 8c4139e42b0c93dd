"""Changes of a model that undo themselves when an exception strikes, at whatever line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Undo = Callable[[Callable[[], object]], None]
"""Note how to take the next change back; called before the change, so taking back must do no harm without it."""


@contextmanager
def all_or_nothing() -> Iterator[Undo]:
    """Inside, every change is announced to what the block is given; after an exception all are taken back."""
    steps: list[Callable[[], object]] = []
    try:
        yield steps.append
    except BaseException:
        for step in reversed(steps):
            step()
        raise


def restoring(*owners: Any) -> Callable[[], None]:
    """How to give dicts their entries and objects their attributes of now back, order included."""
    tables: list[dict[Any, Any]] = [o if isinstance(o, dict) else o.__dict__ for o in owners]
    kept = [dict(t) for t in tables]

    def restore() -> None:
        for table, before in zip(tables, kept, strict=True):
            table.clear()
            table.update(before)

    return restore
