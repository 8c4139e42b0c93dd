"""The errors users read. Each names what is wrong, where, what is allowed, and what to type instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

POOL = 2000
"""Among how many names one is looked for that was meant."""
WORD = 200
"""Characters of a value in a message."""


class LoraLiteError(Exception):
    """Base of every error raised on purpose by lora_lite."""


class ConfigError(LoraLiteError, ValueError):
    """A config field has a wrong type, name or value."""


class TargetError(LoraLiteError, ValueError):
    """A pattern hits nothing, or a target cannot be adapted."""


class WeightError(LoraLiteError, RuntimeError):
    """A weight is quantised, offloaded or sharded where a dense one is needed."""


class StateError(LoraLiteError, RuntimeError):
    """The call does not fit the model's present state (already attached, merged, unknown adapter)."""


class SelectionError(StateError):
    """Which adapters act on a call is ambiguous or does not fit the batch."""


class FileError(LoraLiteError, ValueError):
    """An adapter file is damaged, of another format, or does not fit the model."""


class BaseMismatchError(FileError):
    """The adapter was trained on other base weights than the model has."""


class WriteError(FileError, OSError):
    """A file could not be written where it was to stand: a full disk, a place that may not be written to."""


class LoraLiteWarning(UserWarning):
    """The one warning class; `warnings.simplefilter("error", LoraLiteWarning)` makes all of them raise."""


def did_you_mean(word: str, pool: Iterable[str], n: int = 3) -> str:
    """A sentence that names the entries of `pool` nearest to `word`, or an empty string."""
    names = _shortlist(word, list(dict.fromkeys(pool)))
    near = difflib.get_close_matches(word, names, n=n, cutoff=0.5)
    if not near:  # paths differ mostly in their prefix: compare the last segments too
        tails = {name.rsplit(".", 1)[-1]: name for name in names}
        near = [tails[m] for m in difflib.get_close_matches(word.rsplit(".", 1)[-1], tails, n=n, cutoff=0.5)]
    return f" Did you mean {', '.join(repr(m) for m in near)}?" if near else ""


def _shortlist(word: str, names: list[str]) -> list[str]:
    """At most `POOL` names, those that end as the word does before others: comparing takes long."""
    if len(names) > POOL:
        tail = word.rsplit(".", 1)[-1]
        names = sorted(names, key=lambda name: not name.endswith(tail))[:POOL]
    return [name for name in names if len(name) <= 10 * WORD]


def shown(value: object) -> str:
    """A value as it stands in a message: not longer than is read."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= WORD else f"{text[:WORD]}…"


def listing(items: Iterable[str], n: int = 6) -> str:
    """The first `n` items, quoted, and how many more there are."""
    items = list(items)
    text = ", ".join(shown(i) for i in items[:n])
    return text + (f" and {len(items) - n} more" if len(items) > n else "")


def size_text(n: int) -> str:
    """A number of bytes: "1.5 GiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n / 2**10:.1f} KiB"
