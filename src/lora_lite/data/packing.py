"""Several short rows in one long one, each with positions of its own, so that none sees another."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from .tokens import IGNORED, Tokens


def packed(rows: Sequence[Tokens], length: int) -> list[Tokens]:
    """Rows of at most `length` tokens made of whole ones: each into the fullest that has room for it, longest first.

    `position_ids` begin at 0 with each row, by which attention is kept inside of it; the first token of a row is
    learned from nothing.
    """
    found: list[Tokens] = []
    rooms: list[tuple[int, int]] = []
    """(free tokens, number) of every block, in order."""
    for row in sorted(rows, key=lambda r: -len(r["input_ids"])):
        n = len(row["input_ids"])
        at = bisect.bisect_left(rooms, (n, 0))
        if at == len(rooms):
            room, number = length, len(found)
            found.append({"input_ids": [], "labels": [], "position_ids": []})
        else:
            room, number = rooms.pop(at)
        block = found[number]
        block["input_ids"] += row["input_ids"]
        block["labels"] += [IGNORED, *row["labels"][1:]]
        block["position_ids"] += range(n)
        bisect.insort(rooms, (room - n, number))
    return found
