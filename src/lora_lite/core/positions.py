"""Which token positions a method acts on: the words for it, and the config field that holds them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from .config import AdapterConfig
from .errors import ConfigError

SCOPES = ("all", "prompt", "generated")


@dataclass(frozen=True, kw_only=True)
class BlockConfig(AdapterConfig):
    """Config of a method that edits the residual stream after a block; `layers` selects the blocks."""

    positions: str = "all"
    """Token positions to edit: "all", "prompt", "generated" (after the prompt), or "f7+l7": the first 7 and last 7
    tokens of the prompt. Also "f7" or "l7" alone. With both, a prompt of n tokens gives at most n//2 to each.
    "from:5,17": from the last occurrence of the token ids 5, 17 on."""

    def validate(self) -> None:
        super().validate()
        parse_positions(self.positions, f"{type(self).__name__}.positions")


class Since(NamedTuple):
    """From the last occurrence of these token ids on."""

    tokens: tuple[int, ...]


def parse_positions(text: str, where: str = "positions") -> str | tuple[int, int] | Since:
    """One of `SCOPES`, or (p, s): the first p and last s tokens of the prompt, or from where some tokens stand."""
    if text in SCOPES:
        return text
    if re.fullmatch(r"from:\d+(,\d+)*", text):
        return Since(tuple(map(int, text.removeprefix("from:").split(","))))
    found = re.fullmatch(r"f(\d+)\+l(\d+)|f(\d+)|l(\d+)", text)
    p, s = (int(found[1] or found[3] or 0), int(found[2] or found[4] or 0)) if found else (0, 0)
    if p + s == 0:
        raise ConfigError(
            f"{where} must be one of {', '.join(map(repr, SCOPES))}, or name prompt tokens like 'f7+l7', 'f1' or "
            f"'l1', or token ids like 'from:5,17'; got {text!r}."
        )
    return p, s
