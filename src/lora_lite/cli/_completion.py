"""`lora-lite --tyro-print-completion SHELL`: the script by which a shell completes verbs, flags and methods."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import typing
from collections.abc import Callable
from typing import Annotated, Any

from ._method import field_docs
from ._verbs import command_of

PRINT = "--tyro-print-completion"


def described(verb: str) -> type:
    """The command of a verb with the flags of LoRA, each said on one line: a shell takes the next one for a word."""
    import tyro

    command = command_of(verb, [verb])
    hints, docs = typing.get_type_hints(command, include_extras=True), field_docs(command)
    fields: list[Any] = []
    for f in dataclasses.fields(command):
        if dataclasses.is_dataclass(f.default_factory):  # the method's, which are described already
            continue
        said = tyro.conf.arg(help=docs.get(f.name, ""))
        fields.append((f.name, Annotated[hints[f.name], said], dataclasses.field(default=f.default)))
    made = dataclasses.make_dataclass(command.__name__, fields, bases=(command,), frozen=True, kw_only=True)
    made.__doc__ = command.__doc__
    return made


def script(parse: Callable[[], object]) -> str:
    """What tyro prints, with files where no word is known: bash would complete nothing else."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        parse()
    return printed.getvalue().replace("\ncomplete -F ", "\ncomplete -o default -F ")
