"""The flags of a command: what each takes, and whether a word is of that kind."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import lora_lite as ll

from ..core.errors import did_you_mean, shown


class NoSuchWord(ll.ConfigError):
    """A verb or flag that does not exist, or a word that its flag does not take."""


@dataclass(frozen=True)
class Flag:
    """One field of a command."""

    name: str
    kind: Any
    """Its type, without what is said of it for the help."""
    default: Any
    positional: bool

    @property
    def typed(self) -> str:
        """How it is written: `--max-length`, or `ADAPTER` where it stands without a flag."""
        return self.name.upper() if self.positional else f"--{self.name.replace('_', '-')}"

    @property
    def switch(self) -> bool:
        return self.kind is bool

    @property
    def many(self) -> bool:
        """Whether it takes any number of words."""
        return any(get_origin(kind) in (tuple, dict) for kind in (self.kind, *get_args(self.kind)))


def flags_of(command: type) -> dict[str, Flag]:
    """Name -> flag, those of the method and other names included."""
    hints = typing.get_type_hints(command, include_extras=True)
    found: dict[str, Flag] = {}
    for f in dataclasses.fields(command):
        nested = f.default_factory if f.name == "adapter" and isinstance(f.default_factory, type) else None
        if nested is not None:
            found |= flags_of(nested)
            continue
        kind, said = hints[f.name], ()
        if get_origin(kind) is Annotated:
            kind, said = kind.__origin__, kind.__metadata__
        default = f.default if f.default_factory is MISSING else f.default_factory()
        flag = Flag(f.name, kind, default, any("Positional" in str(note) for note in said))
        found |= {name: flag for name in (f.name, *_other_names(said))}
    return found


def _other_names(said: Sequence[Any]) -> list[str]:
    return [name.lstrip("-") for note in said for name in getattr(note, "aliases", None) or ()]


def check_values(flag: Flag, values: Sequence[str]) -> None:
    """Whether these are words that the flag takes.

    Raises:
        NoSuchWord: one is not, or there is none.
    """
    if not values and not flag.many:
        raise NoSuchWord(f"{flag.typed} needs a value: {wanted(flag.kind)}.")
    if values and not fits(flag.kind, values):
        wrong = next((value for value in values if not fits(flag.kind, [value])), " ".join(values))
        near = did_you_mean(wrong, choices(flag.kind), 1)
        raise NoSuchWord(f"{flag.typed} takes {wanted(flag.kind)}, got {shown(wrong)}.{near}")


def fits(kind: Any, values: Sequence[str]) -> bool:
    """Whether words can be read as a value of this type."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(one, values) for one in inner)
    if origin is tuple:
        return all(fits(inner[0], [value]) for value in values)
    if origin is dict:
        pairs = zip(values[::2], values[1::2], strict=False)
        return len(values) % 2 == 0 and all(fits(inner[0], [k]) and fits(inner[1], [v]) for k, v in pairs)
    if len(values) != 1:
        return False
    if origin is Literal:
        return values[0] in map(str, inner)
    if kind in (int, float):
        try:
            kind(values[0])
        except ValueError:
            return False
        return True
    if kind is bool:
        return values[0] in ("True", "False")
    return kind is not types.NoneType or values[0] == "None"


def choices(kind: Any) -> list[str]:
    """The words among which a value is chosen, if there are few."""
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    return [word for one in get_args(kind) for word in choices(one)]


def wanted(kind: Any) -> str:
    """What a value is, in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(wanted(one) for one in inner)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        return f"words, each {wanted(inner[0])}"
    if origin is dict:
        return f"pairs of a name and {wanted(inner[1])}, such as q_proj 4"
    words = {int: "a whole number", float: "a number", bool: "True or False", types.NoneType: "None", str: "a word"}
    return words.get(kind, "a path")
