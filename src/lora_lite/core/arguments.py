"""The arguments of public calls, checked in one place: all are there, none is unknown, and each is of the kind that its
annotation names. What is more than a kind (a config, a model, a path) has its own check with its own words."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

from .errors import ConfigError, did_you_mean, shown

P = ParamSpec("P")
R = TypeVar("R")
NAMES = ("name", "old", "new")
"""Arguments that are an adapter's name."""


class CallError(ConfigError, TypeError):
    """A public call lacks an argument, has one too many, or one of another kind."""


def _is_whole(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral)


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real)


KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "None": (lambda value: value is None, "None"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "int": (_is_whole, "a whole number"),
    "float": (_is_number, "a number"),
    "str": (lambda value: isinstance(value, str), "a str"),
    "Path": (lambda value: isinstance(value, os.PathLike), "a path"),
}
"""Word of an annotation -> (whether a value is of that kind, how it is called)."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which first raises `CallError` where its arguments do not fit its signature and annotations."""
    expected = Expected(function)

    @functools.wraps(function)
    def call(*args: P.args, **given: P.kwargs) -> R:
        expected.check(args, given)
        return function(*args, **given)

    return call


def kinds_of(annotation: object) -> list[str]:
    """The words of an annotation such as "str | None", if each of them is a kind that is checked here."""
    words = annotation.split(" | ") if isinstance(annotation, str) else []
    return words if all(word in KINDS for word in words) else []


class Expected:
    """What a public function or method takes; read once, since some are called for every token."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.parameters = dict(inspect.signature(function).parameters)
        self.method = self.parameters.pop("self", None) is not None
        every = self.parameters.items()
        self.places = [name for name, p in every if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.needed = [name for name, p in every if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        self.takes_any = any(p.kind is p.VAR_KEYWORD for _, p in every)
        self.kinds = {name: found for name, p in every if (found := kinds_of(p.annotation))}
        self.line = f"ll.{function.__name__}"
        if self.method:
            owner = function.__qualname__.removesuffix(".__init__")
            self.line = f"{owner[0].lower()}{owner[1:]}" if "." in owner else f"ll.{owner}"
        self.typed = f"{self.line}({', '.join(self.needed)})"

    def check(self, args: Sequence[object], given: Mapping[str, Any]) -> None:
        """Raises: CallError: an argument is missing, unknown, given twice or of another kind."""
        args = args[1:] if self.method else args
        if len(args) > len(self.places):
            order = _listed(self.places)
            raise CallError(f"{self.line} takes {order} in this order, and got {len(args)} arguments: {self.typed}")
        values = dict(zip(self.places, args, strict=False))
        for name in given:
            if name in values:
                raise CallError(f"{self.line} got {name} twice, by its place and by its name: {self.typed}")
            if name not in self.parameters and not self.takes_any:
                near = did_you_mean(name, self.parameters, 1)
                raise CallError(
                    f"{self.line} has no argument {name!r}.{near} It takes {_listed(list(self.parameters))}."
                )
        values.update(given)
        missing = [name for name in self.needed if name not in values]
        if missing:
            raise CallError(f"{self.line} needs {_listed(missing)}: {self.typed}")
        for name, words in self.kinds.items():
            value = values.get(name, self.parameters[name].default)
            if not any(KINDS[word][0](value) for word in words):
                raise CallError(
                    f"{self.line}: {name} is {_wanted(name, words)}, got {shown(value)} of {type(value).__name__}."
                )


def _wanted(name: str, words: Sequence[str]) -> str:
    said = " or ".join(KINDS[word][1] for word in words)
    return said.replace("a str", "an adapter's name, a str such as 'default',", 1) if name in NAMES else said


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else "no argument"
