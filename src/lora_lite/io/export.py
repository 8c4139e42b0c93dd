"""`ll.export`: an adapter for other programs, in their layouts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from torch import nn

from ..core.errors import FileError
from ..runtime.model.state import not_merged, record_of, state_of, unwrap
from .peft import write_peft

Format = Literal["peft", "lora"]
FORMATS = ("peft", "lora")


def export(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    format: Format = "peft",
    *,
    rank: int | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
) -> Path:
    """Write one adapter for PEFT, vLLM, llama.cpp and others.

    Args:
        folder: made if it is not there. An adapter in it is replaced at once, so that a killed process leaves the old
            or the new one; its other files stay.
        format: "peft" is exact: a plain LoRA where the update is of low rank, else the PEFT type that holds the same
            function. "lora" is a plain LoRA whatever the method, in the one form that every server reads alike.
        rank: write the LoRA of this rank that is nearest to the update, and say how near it is.
        base_model: what the file names as its base; None takes the name that the model was loaded by.
        task_type: PEFT's, such as "SEQ_CLS"; None is "CAUSAL_LM" for models that generate from `input_ids`, and nothing
            for others.

    Raises:
        StateError: no PEFT type holds the function exactly and no rank is asked for, or the model is merged.
        FileError: the folder cannot be written; what was in it is as it was.
    """
    if format not in FORMATS:
        raise FileError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}.")
    if rank is not None and not (type(rank) is int and rank > 0):
        raise FileError(f"rank must be a whole number from 1 on, got {rank!r}.")
    model = unwrap(model)
    record = record_of(model, name)
    not_merged(state_of(model), "ll.export")
    return write_peft(model, record, Path(folder), rank, base_model, task_type, plain=format == "lora")
