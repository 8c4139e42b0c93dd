"""Mistyped verbs and flags, and those of other tools: the nearest one is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import lora_lite as ll

from ..core.errors import did_you_mean

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
        ConfigError: the first word is none.
    """
    first = words[0] if words else "--help"
    if first.startswith("-"):
        return
    raise NoSuchWord(
        f"lora-lite has no command {first!r}.{did_you_mean(first, verbs, 1)} There are: {', '.join(verbs)}."
    )


def check_words(verb: str, command: type, words: Sequence[str]) -> None:
    """Name the flag that was meant, also where it is called otherwise in another tool.

    Raises:
        ConfigError: a flag that the command does not have.
    """
    known = flags_of(command)
    for word in words:
        name = word[2:].partition("=")[0].replace("-", "_")
        if not word.startswith("--") or not name or name in known or word.startswith(("--help", "--tyro")):
            continue
        shown = f"--{name.replace('_', '-')}"
        if ELSEWHERE.get(name) in known:
            ours = ELSEWHERE[name].replace("_", "-")
            raise NoSuchWord(f"lora-lite {verb} has no flag {shown}: here it is called --{ours}.")
        near = did_you_mean(shown, [f"--{f.replace('_', '-')}" for f in known], 1)
        raise NoSuchWord(f"lora-lite {verb} has no flag {shown}.{near} All flags: lora-lite {verb} --help")


class NoSuchWord(ll.ConfigError):
    """A verb or flag that does not exist."""


def flags_of(command: type) -> set[str]:
    """Names of all flags, those of the method included."""
    found: set[str] = set(getattr(command, "aliases", ()))
    for f in dataclasses.fields(command):
        nested = f.default_factory if f.name == "adapter" and isinstance(f.default_factory, type) else None
        found |= flags_of(nested) if nested is not None else {f.name}
    return found
