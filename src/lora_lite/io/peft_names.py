"""Which layers a name of adapter_config.json means: PEFT's rules, with a limit for what strangers wrote."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

from ..core.errors import FileError

SECONDS = 5.0
"""How long the regular expressions of one folder may run."""
PLAIN = re.compile(r"[\w.\-]*")
SEARCH = """
import json, re, sys
patterns, paths = json.load(sys.stdin)
json.dump([[bool(re.fullmatch(p, path)) for path in paths] for p in patterns], sys.stdout)
"""


class Matcher:
    """PEFT's rules over the paths of one model.

    A literal name is compared. A regular expression, which may take for ever, runs in a process of its own that is
    ended after `SECONDS`; each is asked once, about all paths.
    """

    def __init__(self, paths: list[str], where: str) -> None:
        self.paths, self.where = paths, where
        self._hits: dict[str, frozenset[str]] = {}

    def matches(self, pattern: str, path: str) -> bool:
        """Whether the whole path matches."""
        if pattern not in self._hits:
            self._hits[pattern] = frozenset(self._search(pattern))
        return path in self._hits[pattern]

    def tail(self, pattern: str, path: str) -> bool:
        """Whether the path, or its tail after a dot, matches: the rule of rank_pattern and its like."""
        name = pattern.replace("\\.", ".").removesuffix("$")
        if PLAIN.fullmatch(name.removeprefix("^")):
            return path == name[1:] if name.startswith("^") else f".{path}".endswith(f".{name}")
        return self.matches(rf"(?:.*\.)?(?:{pattern})", path)

    def value(self, patterns: Any, path: str, default: Any) -> Any:
        """The value of the first pattern that matches the path or its tail."""
        if not isinstance(patterns or {}, dict):
            raise FileError(f"{self.where}: {patterns!r} must be a mapping.")
        return next((v for k, v in (patterns or {}).items() if self.tail(k, path)), default)

    def named(self, names: Any, path: str) -> bool:
        """The rule of target_modules: a regular expression for the whole path, or a list of tails."""
        if isinstance(names, str):
            return path == names if PLAIN.fullmatch(names) else self.matches(names, path)
        return isinstance(names, list) and any(path == n or path.endswith(f".{n}") for n in names)

    def _search(self, pattern: str) -> list[str]:
        asked = json.dumps([[pattern], self.paths])
        try:
            answer = subprocess.run(
                [sys.executable, "-I", "-S", "-c", SEARCH], input=asked, capture_output=True, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            raise FileError(
                f"{self.where}: the regular expression {pattern!r} ran for more than {SECONDS:.0f} seconds over the "
                "names of the model's layers. Write the names out in adapter_config.json."
            ) from None
        if answer.returncode:
            reason = answer.stderr.strip().splitlines()[-1:] or ["no answer"]
            raise FileError(f"{self.where}: {pattern!r} is not a regular expression ({reason[0]}).")
        return [path for path, hit in zip(self.paths, json.loads(answer.stdout)[0], strict=True) if hit]
