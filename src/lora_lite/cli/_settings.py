"""`--config run.yaml`: settings from a file and from presets, as the words that a user would have typed."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lora_lite as ll

from ._console import say
from ._flags import Flag, flags_of
from ._verbs import command_of

PRESETS: dict[str, dict[str, Any]] = {
    "small": {"r": 4, "batch_size": 8},
    "quality": {"r": 32, "epochs": 3},
    "memory": {"r": 8, "batch_size": 1, "accumulation": 16, "gradient_checkpointing": True, "load_in_4bit": True},
}
"""For people who know no ranks: a small file, the best result, the least memory."""
UNWRITTEN = ("resume", "overwrite", "dry_run", "debug", "config", "preset", "out")
"""Flags of one call, which a file of settings does not keep."""


def expanded(words: Sequence[str]) -> list[str]:
    """A command line with the settings of `--config` and `--preset` in front of its own flags, which win.

    Raises:
        ConfigError: no such preset.
        FileError: the file is missing or holds no settings.
    """
    verb, rest = words[0], list(words[1:])
    rest, file = taken(rest, "--config")
    mine = {name for flag, _ in flags_in(rest) for name in (flag, flag.removeprefix("no_"))}
    settings = read_settings(Path(file), verb) if file is not None else {}
    settings = fitting(settings, rest)
    _, preset = taken(rest, "--preset")
    preset = preset if preset is not None else settings.get("preset")
    if preset is not None:
        settings = {**preset_of(str(preset), rest, settings), **settings}
    flags = flags_of_verb(verb, settings, rest)
    front = [w for name, value in settings.items() if name not in mine for w in words_of(name, value, flags.get(name))]
    return [verb, *front, *rest]


def flags_of_verb(verb: str, settings: Mapping[str, Any], words: Sequence[str]) -> dict[str, Flag]:
    """The flags of a command with its method's, which the words choose or the settings."""
    from ._method import DEFAULT_METHOD

    if not settings:
        return {}
    return flags_of(command_of(verb, ["--method", str(settings.get("method", DEFAULT_METHOD)), *words]))


def fitting(settings: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The settings without what another method's file says of that method alone, where a flag chooses the method."""
    from ._method import chosen_method

    before, now = settings.get("method"), chosen_method(["--method", str(settings.get("method", "lora")), *words])
    if before in (None, now.name) or before not in {v.name for v in ll.variants()}:
        return dict(settings)
    known = {f.name for f in dataclasses.fields(now.config)} - set(now.ignores)
    plain = ll.get_variant(str(before)).config(variant=str(before)).to_dict()
    left = sorted(name for name in settings if name in plain.keys() - known)
    if chosen := [name for name in left if settings[name] != plain[name]]:
        say(f"note: settings of {before} that {now.name} does not use are left out: {', '.join(chosen)}")
    return {name: value for name, value in settings.items() if name not in left}


def taken(words: Sequence[str], flag: str) -> tuple[list[str], str | None]:
    """The words without a flag and its value, and the value."""
    left, value, i = [], None, 0
    while i < len(words):
        if words[i] == flag and i + 1 < len(words):
            value, i = words[i + 1], i + 2
            continue
        if words[i].startswith(flag + "="):
            value = words[i].partition("=")[2]
        else:
            left.append(words[i])
        i += 1
    return left, value


def flags_in(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(field, word) of every flag of a command line."""
    for word in words:
        if word.startswith("--") and len(word) > 2:
            yield word[2:].partition("=")[0].replace("-", "_"), word


def preset_of(name: str, words: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a preset sets for the method in use.

    Raises:
        ConfigError: no such preset.
    """
    from ..core.errors import did_you_mean
    from ._method import chosen_method

    if name not in PRESETS:
        raise ll.ConfigError(
            f"--preset {name}: there is none of that name.{did_you_mean(name, PRESETS)} Choose from: "
            f"{', '.join(PRESETS)}."
        )
    variant = chosen_method(["--method", str(settings.get("method", "lora")), *words])
    return {k: v for k, v in PRESETS[name].items() if k not in variant.ignores}


def read_settings(path: Path, verb: str) -> dict[str, Any]:
    """The settings of a YAML or JSON file.

    Raises:
        FileError: it is missing, damaged, or no table of settings.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise ll.FileError(f"--config {path} cannot be read: {e.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ll.FileError(f"--config {path} is no YAML: {' '.join(str(e).split())}.") from None
    if not isinstance(found, dict):
        raise ll.FileError(f"--config {path} holds no settings; write lines such as `lr: 1e-4`.")
    settings = {str(k).replace("-", "_"): v for k, v in found.items()}
    wrote = settings.pop("verb", verb)
    if wrote != verb:
        raise ll.FileError(f"--config {path} was written by lora-lite {wrote}; this is lora-lite {verb}.")
    return settings


def words_of(name: str, value: Any, flag: Flag | None = None) -> list[str]:
    """The words of one setting: a switch, which may be on unless somebody turns it off, a list or a table of words, or
    one word."""
    dashed = name.replace("_", "-")
    if isinstance(value, (list, dict)) and not value:
        return []
    if isinstance(value, bool) and (flag is None or flag.switch):
        on = flag is not None and flag.default is True
        return [] if value is on else [f"--{dashed}" if value else f"--no-{dashed}"]
    if isinstance(value, dict):
        return [f"--{dashed}", *(str(x) for pair in value.items() for x in pair)]
    if isinstance(value, (list, tuple)):
        return [f"--{dashed}", *map(str, value)]
    return [f"--{dashed}", str(value)]


def write_settings(path: Path, verb: str, args: Any) -> None:
    """Every setting of a command in the form that `--config` reads, beside its place and then renamed."""
    import yaml

    found: dict[str, Any] = {"verb": verb}
    for f in dataclasses.fields(args):
        value = getattr(args, f.name)
        if f.name == "adapter" and dataclasses.is_dataclass(value):
            found |= {g.name: getattr(value, g.name) for g in dataclasses.fields(value)}
        elif f.name not in UNWRITTEN:
            found[f.name] = value
    plain = json.loads(json.dumps(found, default=str))
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")
    beside.replace(path)


def imported(words: Sequence[str]) -> list[str]:
    """The words without `--import MODULE`; each module is imported, from the working directory too.

    Raises:
        ConfigError: there is no such module.
    """
    left, names = [], []
    for i, word in enumerate(words):
        if word == "--import" or (i > 0 and words[i - 1] == "--import"):
            names += [word] if word != "--import" else []
        elif word.startswith("--import="):
            names.append(word.partition("=")[2])
        else:
            left.append(word)
    for name in names:
        _import(name)
    return left


def _import(name: str) -> None:
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        importlib.import_module(name.removesuffix(".py"))
    except ModuleNotFoundError as e:
        raise ll.ConfigError(
            f"--import {name}: no module is called {e.name!r}; it is looked for in this directory and among the "
            "installed packages."
        ) from None
