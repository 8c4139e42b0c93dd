"""The model card of an adapter: what the hub reads at its head, and what a person needs to use it."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .._version import __version__
from .homes import trainable

SECRET = re.compile("token|secret|password|key", re.IGNORECASE)
"""What a flag is called whose value is nobody else's business."""


def card(
    model: nn.Module,
    exported: bool,
    history: Iterable[Mapping[str, Any]] = (),
    steps: int = 0,
    model_name: str | None = None,
    dataset: str | None = None,
    tags: Iterable[str] = (),
) -> str:
    """The text of README.md.

    Args:
        exported: whether PEFT's files stand beside ours.
        history: what the trainer logged; the last of each figure is shown.
        steps: optimiser steps so far.
        model_name: the title.
        dataset: a name on the hub.
        tags: more of them.
    """
    found = trainable(model)
    base = base_of(model)
    methods = list(dict.fromkeys(handle.cfg.variant for _, handle in found))
    head = {
        "base_model": None if base is None or Path(base).exists() else base,
        "library_name": "peft" if exported else "lora-lite",
        "datasets": [dataset] if dataset else None,
        "tags": sorted({"lora-lite", "adapter", *methods, *tags}),
    }
    lines = ["---", *(f"{k}: {json.dumps(v)}" for k, v in head.items() if v), "---", ""]
    lines += [
        f"# {model_name or 'An adapter'}",
        "",
        f"An adapter of {f'`{base}`' if base else 'a model'}, trained with ",
    ]
    lines[-1] += f"lora-lite {__version__}."
    for _, handle in found:
        lines += ["", f"## `{handle.name}`: {handle.cfg.variant}", ""]
        lines += [f"{handle.num_parameters():,} trained parameters on {len(handle.targets)} layers.", ""]
        lines += ["```json", json.dumps(handle.cfg.to_dict(), sort_keys=True), "```"]
    lines += ["", "## Use", "", "```python", "import lora_lite as ll", "", 'll.load(model, "this folder")', "```", ""]
    if exported:
        lines += ["PEFT, vLLM and `AutoModel.from_pretrained` read this folder, too."]
    else:
        lines += [
            "Only lora-lite reads it. `ll.export(model, folder)` writes what PEFT reads, where the method allows."
        ]
    told = command()
    if told is not None:
        lines += ["", "## Trained by", "", "```bash", told, "```"]
    figures = _last(history)
    if figures or steps:
        lines += ["", "## Figures", "", "| what | last value |", "| --- | --- |", f"| steps | {steps} |"]
        lines += [f"| {what} | {value:.6g} |" for what, value in figures.items()]
    return "\n".join(lines) + "\n"


def base_of(model: nn.Module) -> str | None:
    """Name or folder of the base, as the model knows it."""
    for home, _ in trainable(model):
        name = getattr(getattr(home, "config", None), "_name_or_path", None)
        if name:
            return str(name)
    return None


def command() -> str | None:
    """The command that runs: the script's name and its arguments, without this machine's folders and without secrets.
    None where no script runs, as in a notebook."""
    script, *words = sys.argv or [""]
    if not os.path.isfile(script) or "ipykernel" in script:
        return None
    said = ["python"] if script.endswith(".py") else []
    said.append(Path(script).name)
    secret = False
    for word in words:
        flag, is_set, value = word.partition("=")
        hides = word.startswith("-") and SECRET.search(flag) is not None
        if hides and is_set:
            word = f"{flag}=..."
        elif secret and not word.startswith("-"):
            word = "..."
        elif is_set and os.path.isabs(value):
            word = f"{flag}={Path(value).name}"
        elif os.path.isabs(word):
            word = Path(word).name
        said.append(word)
        secret = hides and not is_set
    return shlex.join(said)


def fields(model: nn.Module) -> dict[str, Any]:
    """Adapter -> its config and size, as plain data for experiment trackers."""
    return {
        handle.name: {**handle.cfg.to_dict(), "targets": len(handle.targets), "parameters": handle.num_parameters()}
        for _, handle in trainable(model)
    }


def _last(history: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The last value of every figure that was logged."""
    figures: dict[str, float] = {}
    for entry in history:
        figures |= {k: float(v) for k, v in entry.items() if isinstance(v, (int, float)) and k != "step"}
    return figures
