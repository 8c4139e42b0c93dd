"""Progress of long work: silent for two seconds, then a bar on a terminal or a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """Iterate over `items` and report on stderr once it takes long."""
    start = last = time.monotonic()
    tty, shown = sys.stderr.isatty(), False
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - start > 2 and now - last > (0.2 if tty else 10):
            eta = (now - start) / done * (len(items) - done)
            bar = "#" * (24 * done // len(items))
            print(
                f"{what} [{bar:<24}] {done}/{len(items)}, {eta:.0f} s left",
                file=sys.stderr,
                end="\r" if tty else "\n",
                flush=True,
            )
            last, shown = now, True
        yield item
    if shown and tty:
        print(f"{what}: {len(items)} in {time.monotonic() - start:.0f} s" + " " * 40, file=sys.stderr)
