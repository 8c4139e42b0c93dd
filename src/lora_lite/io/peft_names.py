"""Which layers a name of adapter_config.json means: PEFT's rules, with a limit for what strangers wrote."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from typing import Any

from ..core.errors import FileError, shown
from .patterns import compiled

SECONDS = 5.0
"""How long the regular expressions of one folder may run."""
MAX_EXPRESSIONS = 1000
"""Regular expressions in one field."""
PLAIN = re.compile(r"[\w.\-]*")


class Matcher:
    """PEFT's rules over the paths of one model: a literal name is compared, a regular expression is run with a time
    limit, once over all paths."""

    def __init__(self, paths: list[str], where: str) -> None:
        self.paths, self.where, self.spent = paths, where, 0.0
        self._hits: dict[str, frozenset[str]] = {}
        self._tables: dict[int, _Table] = {}

    def matches(self, pattern: str, path: str) -> bool:
        """Whether the whole path matches."""
        if pattern not in self._hits:
            self._hits[pattern] = frozenset(self._search(pattern))
        return path in self._hits[pattern]

    def value(self, patterns: Any, path: str, default: Any) -> Any:
        """The value of the first pattern that matches the path or its tail."""
        if not isinstance(patterns or {}, dict):
            raise FileError(f"{self.where}: {shown(patterns)} must be a mapping.")
        if not patterns:
            return default
        if id(patterns) not in self._tables:
            self._tables[id(patterns)] = _Table(patterns, self.where)
        return self._tables[id(patterns)](path, default, self.matches)

    def named(self, names: Any, path: str) -> bool:
        """The rule of target_modules: a regular expression for the whole path, or a list of tails."""
        if isinstance(names, str):
            return path == names if PLAIN.fullmatch(names) else self.matches(names, path)
        return isinstance(names, list) and any(path == n or path.endswith(f".{n}") for n in names)

    def _search(self, pattern: str) -> list[str]:
        start = time.monotonic()
        match = compiled(pattern)
        found = []
        for path in self.paths:
            if match(path):
                found.append(path)
            if self.spent + time.monotonic() - start > SECONDS:
                raise FileError(
                    f"{self.where}: the regular expression {shown(pattern)} ran for more than {SECONDS:.0f} seconds "
                    "over the names of the model's layers. Write the names out in adapter_config.json."
                )
        self.spent += time.monotonic() - start
        return found


class _Table:
    """Overrides of one value: literal tails, with `^` in front whole paths, and regular expressions for tails. The
    first that matches wins."""

    def __init__(self, patterns: dict[str, Any], where: str) -> None:
        self.literal: dict[str, tuple[int, Any]] = {}
        """Name -> (its place among the patterns, value)."""
        self.expressions: list[tuple[int, str, Any]] = []
        for i, (pattern, value) in enumerate(patterns.items()):
            name = pattern.replace("\\.", ".").removesuffix("$")
            if PLAIN.fullmatch(name.removeprefix("^")):
                self.literal.setdefault(name, (i, value))
            else:
                self.expressions.append((i, rf"(?:.*\.)?(?:{pattern})", value))
        if len(self.expressions) > MAX_EXPRESSIONS:
            raise FileError(
                f"{where}: a field of adapter_config.json holds {len(self.expressions)} regular expressions; at most "
                f"{MAX_EXPRESSIONS} are run."
            )

    def __call__(self, path: str, default: Any, matches: Callable[[str, str], bool]) -> Any:
        parts = path.split(".")
        names = [f"^{path}", *(".".join(parts[i:]) for i in range(len(parts)))]
        found = [self.literal[name] for name in names if name in self.literal]
        first, value = min(found, key=lambda f: f[0], default=(1 << 62, default))
        return next((v for i, p, v in self.expressions if i < first and matches(p, path)), value)


def tails(paths: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The shortest names for these paths of which none means another module too, read as ends after a dot."""
    wanted, others = list(paths), set(modules)
    others -= set(wanted)
    taken = {".".join(parts[i:]) for parts in (path.split(".") for path in others) for i in range(len(parts))}
    found: dict[str, None] = {}
    for path in wanted:
        parts = path.split(".")
        names = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
        found[next((name for name in names if name not in taken), path)] = None
    return sorted(found)
