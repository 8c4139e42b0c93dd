"""Changes of a model that undo themselves when an exception strikes, at whatever line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
Undo = Callable[[Callable[[], object]], None]
"""Note how to take the next change back; called before the change, so taking back must do no harm without it."""


def all_or_nothing(change: Callable[[Undo], T]) -> T:
    """What `change` returns. It announces every step to what it is given; after an exception all are taken back.

    A function and no `with` block: of that the end could be interrupted, with the change done and an exception on its
    way.
    """
    steps: list[Callable[[], object]] = []
    try:
        return change(steps.append)
    except BaseException:
        for step in reversed(steps):
            _to_its_end(step)
        raise


@contextmanager
def surely(restore: Callable[[], object]) -> Iterator[None]:
    """`restore()` at the end of the block, again if an exception strikes while it runs; so it may run twice."""
    try:
        yield
        restore()
    except BaseException:
        _to_its_end(restore)
        raise


def _to_its_end(step: Callable[[], object]) -> None:
    try:
        step()
    except BaseException:  # a second one, such as a second Ctrl-C; the first is raised
        step()


def restoring(*owners: Any) -> Callable[[], None]:
    """How to give dicts their entries and objects their attributes of now back, order included."""
    tables: list[dict[Any, Any]] = [o if isinstance(o, dict) else o.__dict__ for o in owners]
    kept = [dict(t) for t in tables]

    def restore() -> None:
        for table, before in zip(tables, kept, strict=True):
            table.clear()
            table.update(before)

    return restore
