"""Mistyped verbs, flags and values, and the flags of other tools: the nearest one is named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING

from ..core.errors import did_you_mean
from ._console import say
from ._flags import Flag, NoSuchWord, check_values, flags_of

ELSEWHERE = {
    "learning_rate": "lr",
    "lora_r": "r",
    "lora_rank": "r",
    "rank": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "target_names",
    "lora_target": "target_names",
    "target_modules": "target_names",
    "model_name_or_path": "model",
    "model_name": "model",
    "base_model": "model",
    "dataset": "data",
    "dataset_name": "data",
    "data_path": "data",
    "train_file": "data",
    "validation_file": "eval_data",
    "output_dir": "out",
    "output": "out",
    "adapter_path": "adapter",
    "adapter_name_or_path": "adapter",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "max_steps": "steps",
    "iters": "steps",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "grad_accumulation_steps": "accumulation",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "clip",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "chat_template": "template",
    "logging_dir": "out",
    "save_steps": "save_every",
    "eval_steps": "eval_every",
    "steps_per_eval": "eval_every",
    "save_total_limit": "keep",
    "resume_from_checkpoint": "resume",
    "torch_dtype": "base_dtype",
    "early_stopping_patience": "patience",
    "val_set_size": "eval_rows",
    "use_dora": "method",
    "fp16": "base_dtype",
}
"""Flags of other tools -> ours."""


def check_verb(words: Sequence[str], verbs: Iterable[str]) -> None:
    """Name the nearest verb.

    Raises:
        NoSuchWord: the first word is none.
    """
    first = words[0] if words else "--help"
    if first.startswith("-"):
        return
    raise NoSuchWord(
        f"lora-lite has no command {first!r}.{did_you_mean(first, verbs, 1)} There are: {', '.join(verbs)}."
    )


def check_words(verb: str, command: type, words: Sequence[str]) -> list[str]:
    """The words of a command, once each is a flag that it has, a value that its flag takes, or a word that the command
    wants without a flag. Switches that say what is so anyway are left out.

    Raises:
        NoSuchWord: one is none of these, or one is missing.
    """
    flags = flags_of(command)
    _check_names(verb, flags, words)
    left: list[str] = []
    loose: list[str] = []
    given: dict[str, list[str]] = {}
    for flag, typed, values in _pieces(flags, words):
        if flag is None:
            loose += typed
        elif flag.switch:
            typed = typed if typed[0].startswith("--no-") == (flag.default is True) else []
        else:
            check_values(flag, values)
            _check_once(flag, given.get(flag.name, values), values)
            given[flag.name] = values
        left += typed
    if not {"-h", "--help"} & set(words):
        _check_loose(verb, flags, loose, given)
    return left


def _check_names(verb: str, flags: Mapping[str, Flag], words: Sequence[str]) -> None:
    """Every word with two dashes is a flag; that of another tool gets ours."""
    for word in words:
        name = word[2:].partition("=")[0].replace("-", "_")
        if not word.startswith("--") or not name or word.startswith(("--help", "--tyro")):
            continue
        flag, shown = _flag(flags, word), f"--{name.replace('_', '-')}"
        if flag is not None and not flag.positional:
            continue
        if flag is not None:
            raise NoSuchWord(f"{flag.typed} stands without a flag: lora-lite {verb} {flag.typed}")
        if ELSEWHERE.get(name) in flags:
            ours = ELSEWHERE[name].replace("_", "-")
            raise NoSuchWord(f"lora-lite {verb} has no flag {shown}: here it is called --{ours}.")
        near = did_you_mean(shown, [f"--{f.replace('_', '-')}" for f in flags], 1)
        raise NoSuchWord(f"lora-lite {verb} has no flag {shown}.{near} All flags: lora-lite {verb} --help")


def _flag(flags: Mapping[str, Flag], word: str) -> Flag | None:
    """The flag of a word such as `--seed`, `--seed=3` or, of a switch, `--no-bias`."""
    name, _, value = word[2:].partition("=")
    name = name.replace("-", "_")
    opposite = flags.get(name.removeprefix("no_"))
    if name not in flags and opposite is not None and opposite.switch and not value:
        return opposite
    return flags.get(name)


def _pieces(flags: Mapping[str, Flag], words: Sequence[str]) -> Iterator[tuple[Flag | None, list[str], list[str]]]:
    """(flag, the words as they were typed, the values among them), in order; words without a flag one by one."""
    i = 0
    while i < len(words):
        word, begin = words[i], i
        i += 1
        flag = _flag(flags, word) if word.startswith("--") else None
        if flag is None:
            yield None, [word], []
            continue
        values = [word.partition("=")[2]] if "=" in word else []
        while not flag.switch and "=" not in word and i < len(words) and not words[i].startswith("--"):
            values.append(words[i])
            i += 1
            if not flag.many:
                break
        yield flag, list(words[begin:i]), values


def _check_once(flag: Flag, before: list[str], now: list[str]) -> None:
    """Of a flag that is given twice the last one counts, as everywhere, and that is said; lists are ambiguous."""
    if before == now:
        return
    if flag.many:
        line = " ".join((flag.typed, *before, *now))
        raise NoSuchWord(f"{flag.typed} is given twice; write all its words after one: {line}")
    say(f"note: {flag.typed} is given twice; the last one counts: {now[0]}")


def _check_loose(verb: str, flags: Mapping[str, Flag], loose: list[str], given: Mapping[str, list[str]]) -> None:
    """The words that stand without a flag are as many as the command takes, and what it needs is there."""
    places = [flag for flag in flags.values() if flag.positional]
    needed = [flag for flag in places if flag.default is MISSING]
    line = " ".join(["lora-lite", verb, *(flag.typed for flag in places)])
    if len(loose) < len(needed):
        raise NoSuchWord(f"lora-lite {verb} needs {needed[len(loose)].typed}: {line}")
    if len(loose) > len(places) and not any(flag.many for flag in places):
        extra = loose[len(places)]
        hint = " A switch takes no value." if extra.lower() in ("true", "false") else f" It takes: {line} [FLAGS]"
        raise NoSuchWord(f"lora-lite {verb} has no use for the word {extra!r}.{hint}")
    for flag in places:
        here = loose if flag.many else loose[:1]
        if here:
            check_values(flag, here)
        loose = loose[len(here) :]
    for flag in flags.values():
        if flag.default is MISSING and not flag.positional and flag.name not in given:
            raise NoSuchWord(f"lora-lite {verb} needs {flag.typed}.")
