"""`ll.export`: an adapter for other programs, in their layouts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

from torch import nn

from ..core.arguments import checked
from ..core.errors import FileError, listing
from ..core.files import check_path
from ..runtime.model.record import Record
from ..runtime.model.state import not_merged, record_of, state_of, unwrap
from ..runtime.model.surroundings import own_surroundings
from .other_writers import write_other
from .peft import refused, write_peft

Format = Literal["peft", "lora", "diffusers", "kohya", "mlx", "llama.cpp"]
FORMATS = get_args(Format)


@checked
@own_surroundings()
def export(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    format: Format = "peft",
    *,
    rank: int | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    prefix: str | None = None,
) -> Path:
    """Write one adapter for PEFT, vLLM, llama.cpp and others.

    Args:
        folder: made if it is not there. An adapter in it is replaced at once, so that a killed process leaves the old
            or the new one; its other files stay.
        format: "peft" is exact: a plain LoRA where the update is of low rank, else the PEFT type that holds the same
            function. "lora" is a plain LoRA whatever the method, in the one form that every server reads alike, and
            "llama.cpp" the same without what its converter refuses. "diffusers" and "kohya" are files of image models,
            "mlx" MLX-LM's folder.
        rank: write the LoRA of this rank that is nearest to the update, and say how near it is.
        base_model: what the file names as its base; None takes the name that the model was loaded by.
        task_type: PEFT's, such as "SEQ_CLS"; None is "CAUSAL_LM" for models that generate from `input_ids`, and nothing
            for others.
        prefix: diffusers and kohya: the part of a pipeline that the model is, such as "unet"; None takes it from the
            model's class, and "" writes the bare paths.

    Raises:
        StateError: no PEFT type holds the function exactly and no rank is asked for, or the model is merged.
        FileError: the folder cannot be written; what was in it is as it was.
    """
    check_path(folder)
    if format not in FORMATS:
        raise FileError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}.")
    if rank is not None and not (type(rank) is int and rank > 0):
        raise FileError(f"rank must be a whole number from 1 on, got {rank!r}.")
    check_path(folder)
    model = unwrap(model)
    record = record_of(model, name)
    not_merged(state_of(model), "ll.export")
    if format in ("diffusers", "kohya", "mlx"):
        return write_other(model, record, Path(folder), format, rank, prefix)
    if format == "llama.cpp" and record.beside:
        raise refused(record, f"llama.cpp's converter takes no layer that is trained whole: {listing(_paths(record))}")
    return write_peft(model, record, Path(folder), rank, base_model, task_type, plain=format in ("lora", "llama.cpp"))


def _paths(record: Record) -> list[str]:
    return [t.path for t in record.beside]
