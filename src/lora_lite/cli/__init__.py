"""The command line: one file per verb (floor 5). Flags are generated from dataclasses, methods from the registry."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Annotated, Any

from ._verbs import VERBS, command_of

EXTRAS = {
    "tyro": "cli",
    "rich": "cli",
    "matplotlib": "cli",
    "transformers": "cli",
    "trl": "cli",
    "datasets": "cli",
    "accelerate": "cli",
    "bitsandbytes": "quant",
    "lm_eval": "eval",
    "fastapi": "serve",
    "uvicorn": "serve",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for a mistake that is named in one sentence, 130 after Ctrl-C."""
    from ._console import divert

    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    debug = "--debug" in words
    try:
        return _run(words)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `lora-lite variants | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere
        return 141
    except ImportError as e:
        package = (e.name or "").partition(".")[0]
        if debug or package not in EXTRAS:
            raise
        return _fail(f'error: this command needs the package {package}: pip install "lora-lite[{EXTRAS[package]}]"')
    except Exception as e:
        from ..core.errors import LoraLiteError

        if debug or not isinstance(e, (LoraLiteError, OSError)):
            raise
        if type(e).__name__ == "NoSuchWord":  # as for what tyro refuses
            raise SystemExit(_fail(f"error: {e}")) from None
        return _fail(f"error: {e}" if isinstance(e, LoraLiteError) else f"error: {_system(e)}")
    finally:
        divert(False)


def _run(words: list[str]) -> int:
    from .._version import __version__

    if words == ["--version"]:
        print(f"lora-lite {__version__}")
        return 0
    import tyro

    from ._completion import PRINT, check_shell, described, script
    from ._console import divert
    from ._settings import expanded, imported
    from ._words import check_verb, check_words

    words = imported(words)
    if words[:2] == ["bench", "learn"]:
        from . import bench_learn

        return bench_learn.main(words[2:])
    verb = words[0] if words and words[0] in VERBS else None
    options = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff)
    about = "Adapters for frozen PyTorch models. Start with: lora-lite demo"
    if verb is None:
        if words[:1] == [PRINT]:
            check_shell(words)
        check_verb(words, VERBS)
        commands: Any = None
        for name in VERBS:
            command = described(name) if words[0] == PRINT else command_of(name, None)
            choice = Annotated[command, tyro.conf.subcommand(name, description=_first_sentences(command))]
            commands = choice if commands is None else commands | choice
        parse = functools.partial(tyro.cli, commands, prog="lora-lite", description=about, args=words, config=options)
        if words[0] == PRINT:
            print(script(parse, words[1]), end="")
            return 0
        parse()
        raise AssertionError("tyro leaves by itself")
    words = expanded(words)
    command = command_of(verb, words)
    divert("--json" in words and getattr(command, "json", None) is False)  # where it is a switch
    left = check_words(verb, command, words[1:])
    args = tyro.cli(command, prog=f"lora-lite {verb}", description=_about(command), args=left, config=options)
    return importlib.import_module(f".{verb}", __name__).run(args)


def _first_sentences(command: type) -> str:
    """What the list of all verbs says of one: the first paragraph of its docstring."""
    return " ".join(inspect.cleandoc(command.__doc__ or "").split("\n\n")[0].split())


def _about(command: type) -> str:
    """The docstring of a verb, its paragraphs broken at the terminal's width.

    tyro would leave that to the terminal, which breaks within words; and it joins lines again unless they are indented.
    """
    width = shutil.get_terminal_size().columns
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(textwrap.fill(" ".join(p.split()), width, subsequent_indent="  ") for p in paragraphs)


def _system(e: OSError) -> str:
    """What the system refused, and where."""
    reason = e.strerror or str(e)
    return f"{e.filename}: {reason}." if e.filename else f"{reason}."


def _fail(text: str) -> int:
    try:
        from ._console import complain

        complain(text)
    except ImportError:  # rich is what is missing
        print(text, file=sys.stderr)
    return 2
