"""`lora-lite --tyro-print-completion SHELL`: the script by which a shell completes verbs, flags and methods."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import typing
from collections.abc import Callable
from typing import Annotated, Any

from ..core.errors import ConfigError
from ._method import field_docs
from ._verbs import command_of

PRINT = "--tyro-print-completion"
SHELLS = ("bash", "zsh", "fish")


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


def check_shell(words: list[str]) -> None:
    """What follows `--tyro-print-completion`.

    Raises:
        ConfigError: it is no shell that can be served.
    """
    if len(words) != 2 or words[1] not in SHELLS:
        given = " ".join(words[1:]) or "nothing"
        raise ConfigError(f"{PRINT} takes one shell of {', '.join(SHELLS)}, got {given}.")


def script(parse: Callable[[], object], shell: str) -> str:
    """What tyro prints, with files where no word is known: bash would complete nothing else.

    Raises:
        ConfigError: this tyro does not know the shell.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            parse()
    except (AssertionError, ValueError, ImportError) as e:
        raise ConfigError(f"this version of tyro writes no script for {shell} ({e}); pip install -U tyro.") from e
    return printed.getvalue().replace("\ncomplete -F ", "\ncomplete -o default -F ")
