"""The flags of the chosen method, read from its registered config: `--method NAME` decides which ones there are."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Sequence
from typing import Annotated, Any

import lora_lite as ll

from ..core.errors import did_you_mean
from ..core.registry import called, said_as

DEFAULT_METHOD = "lora"
SHARED = ("variant", "seed")
"""Fields that the command sets itself: the method's name, and the one seed of the run."""


def chosen_method(argv: Sequence[str]) -> type[ll.Variant]:
    """The method that `--method` names in a command line.

    Raises:
        ConfigError: there is none of that name.
    """
    name = DEFAULT_METHOD
    for i, word in enumerate(argv):
        if word == "--method" and i + 1 < len(argv):
            name = argv[i + 1]
        elif word.startswith("--method="):
            name = word.removeprefix("--method=")
    names = [v.name for v in ll.variants()]
    known = called(name)
    if name not in names and known is not None:
        raise ll.ConfigError(f"--method {name}: there is no such method, {said_as(name, known)}.")
    if name not in names:
        raise ll.ConfigError(
            f"--method {name}: there is no such method.{did_you_mean(name, names)} `lora-lite variants` lists all "
            f"{len(names)}."
        )
    return ll.get_variant(name)


def with_method(command: type, variant: type[ll.Variant]) -> type:
    """The command's dataclass with one more field `adapter`, whose flags are the fields of the method's config."""
    import tyro

    flags = config_flags(variant, {f.name for f in dataclasses.fields(command)})
    names = tuple(v.name for v in ll.variants())
    method = typing.Literal[names]  # type: ignore[valid-type]
    full = dataclasses.make_dataclass(
        command.__name__,
        [
            (
                "method",
                Annotated[method, tyro.conf.arg(help="The method; its own options are listed below.")],
                dataclasses.field(default=DEFAULT_METHOD),
            ),
            ("adapter", Annotated[flags, tyro.conf.OmitArgPrefixes], dataclasses.field(default_factory=flags)),
        ],
        bases=(command,),
        frozen=True,
        kw_only=True,
    )
    full.__doc__ = command.__doc__
    return full


def config_flags(variant: type[ll.Variant], taken: set[str] = frozenset()) -> type:  # type: ignore[assignment]
    """A dataclass with the config's fields; one whose name the command has already is called METHOD_field."""
    import tyro

    hints, docs = typing.get_type_hints(variant.config), field_docs(variant.config)
    fields = []
    for f in dataclasses.fields(variant.config):
        if f.name in SHARED:
            continue
        default = (
            dataclasses.field(default_factory=f.default_factory)
            if f.default_factory is not dataclasses.MISSING
            else dataclasses.field(default=f.default)
        )
        note = tyro.conf.arg(help=docs.get(f.name, ""))
        fields.append((flag_name(variant, f.name, taken), Annotated[hints[f.name], note], default))
    made = dataclasses.make_dataclass(f"{variant.name}_options", fields, frozen=True, kw_only=True)
    made.__doc__ = f"Options of {variant.name}"
    return made


def flag_name(variant: type[ll.Variant], field: str, taken: set[str]) -> str:
    return f"{variant.name}_{field}" if field in taken else field


def build_config(command: Any) -> ll.AdapterConfig:
    """The config that a parsed command describes."""
    variant = ll.get_variant(command.method)
    taken = {f.name for f in dataclasses.fields(command)} - {"adapter"}
    values = {
        f.name: getattr(command.adapter, flag_name(variant, f.name, taken))
        for f in dataclasses.fields(variant.config)
        if f.name not in SHARED
    }
    return variant.config(**values, variant=variant.name, seed=getattr(command, "seed", 0))


def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, base classes included."""
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        except (OSError, TypeError, SyntaxError):  # defined in an interpreter
            continue
        assert isinstance(body, ast.ClassDef)
        for line, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(line, ast.AnnAssign)
                and isinstance(line.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                docs[line.target.id] = " ".join(str(below.value.value).split())
    return docs


def check_ignored(command: Any, cfg: ll.AdapterConfig) -> None:
    """Refuse a size or scale that the method does not use.

    Raises:
        ConfigError: a flag was set that has no effect.
    """
    variant = ll.get_variant(cfg.variant)
    plain = variant.config(variant=variant.name)
    for name in variant.ignores:
        if getattr(cfg, name) != getattr(plain, name):
            raise ll.ConfigError(f"--{name} has no effect with method {variant.name!r}; leave it out.")
