"""Regular expressions that strangers wrote, without backtracking: sets of places in the text, so that none can hang."""

from __future__ import annotations

import re
from collections.abc import Callable

from ..core.errors import FileError, shown

Places = set[int]
Node = Callable[[str, Places], Places]
"""Where it may end, of all places where it may begin."""
REPEATS = {"*": (0, None), "+": (1, None), "?": (0, 1)}
COUNTED = re.compile(r"\{(\d*)(,?)(\d*)\}")
ATOM = re.compile(r"\\[\\.\-/_dDwWsS]|\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\\[\]^$.|?*+(){}]")
"""What stands for one character."""
EDGES = {"^": "start", r"\A": "start", "$": "end", r"\Z": "end", r"\b": "edge", r"\B": "inside"}
MAX_TEXT, MAX_COUNT, MAX_DEPTH = 2000, 200, 30


def compiled(pattern: str) -> Callable[[str], bool]:
    """A function that says whether a whole text matches.

    Raises:
        FileError: no regular expression, or one with a reference to a group or a look back.
    """
    if len(pattern) > MAX_TEXT:
        raise FileError(f"{shown(pattern)} is longer than {MAX_TEXT} characters; write the names out.")
    try:
        re.compile(pattern)  # only read, never run
    except (re.error, RecursionError, OverflowError) as e:
        raise FileError(f"{shown(pattern)} is not a regular expression ({e}).") from None
    node = _Parser(pattern).whole()
    return lambda text: len(text) in node(text, {0})


class _Parser:
    """Reads one pattern from the left."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.at, self.depth = pattern, 0, 0

    def whole(self) -> Node:
        node = self.choice()
        if self.at < len(self.pattern):
            raise self.strange()
        return node

    def choice(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.strange()
        branches = [self.sequence()]
        while self.took("|"):
            branches.append(self.sequence())
        self.depth -= 1
        return branches[0] if len(branches) == 1 else lambda t, s: set[int]().union(*(b(t, s) for b in branches))

    def sequence(self) -> Node:
        nodes: list[Node] = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            nodes.append(self.repeated(self.one()))

        def follow(text: str, places: Places) -> Places:
            for node in nodes:
                if not places:
                    break
                places = node(text, places)
            return places

        return follow

    def one(self) -> Node:
        for edge, what in EDGES.items():
            if self.took(edge):
                return lambda t, s: {i for i in s if _at(what, t, i)}
        if self.took("("):
            return self.group()
        found = ATOM.match(self.pattern, self.at)
        if found is None:
            raise self.strange()
        self.at = found.end()
        character = re.compile(found[0]).fullmatch
        return lambda t, s: {i + 1 for i in s if i < len(t) and character(t[i])}

    def group(self) -> Node:
        ahead = 0
        if self.took("?"):
            named = re.compile(r":|P<\w+>|=|!").match(self.pattern, self.at)
            if named is None:
                raise self.strange()
            self.at, ahead = named.end(), {"=": 1, "!": -1}.get(named[0], 0)
        inner = self.choice()
        if not self.took(")"):
            raise self.strange()
        return (lambda t, s: {i for i in s if bool(inner(t, {i})) == (ahead > 0)}) if ahead else inner

    def repeated(self, node: Node) -> Node:
        while self.at < len(self.pattern):
            counted = COUNTED.match(self.pattern, self.at)
            if self.pattern[self.at] in REPEATS:
                least, most = REPEATS[self.pattern[self.at]]
                self.at += 1
            elif counted and (counted[1] or counted[3]):
                least = int(counted[1] or 0)
                most = least
                if counted[2]:
                    most = int(counted[3]) if counted[3] else None
                self.at = counted.end()
            else:
                break
            if max(least, most or 0) > MAX_COUNT or self.took("+"):
                raise self.strange()
            self.took("?")  # the shortest first, which is one set of places with the longest first
            node = _repeat(node, least, most)
        return node

    def took(self, word: str) -> bool:
        found = self.pattern.startswith(word, self.at)
        self.at += len(word) if found else 0
        return found

    def strange(self) -> FileError:
        rest = self.pattern[self.at :]
        return FileError(
            f"the regular expression {shown(self.pattern)} is not read at {shown(rest)}: references, "
            "flags, looks back and counts of hundreds are not run for a file. Write the names out."
        )


def _repeat(node: Node, least: int, most: int | None) -> Node:
    def walk(text: str, places: Places) -> Places:
        for _ in range(least):
            places = node(text, places)
        found, new, n = set(places), set(places), least
        while new and (most is None or n < most):
            new = node(text, new) - found
            found |= new
            n += 1
        return found

    return walk


def _at(edge: str, text: str, i: int) -> bool:
    if edge in ("start", "end"):
        return i == (0 if edge == "start" else len(text))
    before, after = (bool(re.fullmatch(r"\w?", c)) and c != "" for c in (text[max(i - 1, 0) : i], text[i : i + 1]))
    return (before != after) == (edge == "edge")
