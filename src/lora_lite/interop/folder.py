"""The folder that a trainer leaves: our file, PEFT's two where the method allows them, tokenizer, arguments, a card."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_lite as ll

from ..core.errors import FileError, StateError
from ..io import native
from ..io.header import check_sums, config_from_header
from ..io.load import adapter_file
from ..runtime.layers.tensors import is_sharded
from ..runtime.model.site import owned_tensors
from ..runtime.model.state import record_of
from .card import card
from .homes import trainable

CARD = "README.md"


def write_adapters(model: nn.Module, folder: str | os.PathLike[str], compact: bool = True, writer: bool = True) -> bool:
    """Write every trainable adapter of a model into a folder: a file of ours each, and PEFT's two of each whose update
    is a pair of factors, in a folder of its own where there are several.

    Args:
        compact: see `ll.save`.
        writer: whether this process writes; every process of a sharded run must call it.

    Returns:
        Whether PEFT's files are there, too.
    """
    folder, found = Path(folder), trainable(model)
    exported = bool(found)
    for home, handle in found:
        sharded = any(is_sharded(p) for p in handle.parameters())
        write(home, handle.name, folder / adapter_file(handle.name), compact, writer)
        if not writer:
            continue
        own = folder if len(found) == 1 else folder / handle.name
        exported &= not sharded and _exported(home, own, handle.name)
    return exported


def write(home: nn.Module, name: str, path: Path, compact: bool, writer: bool) -> None:
    """Write one adapter; a process that does not write takes its part in gathering the shards."""
    if writer:
        path.parent.mkdir(parents=True, exist_ok=True)
        ll.save(home, path, name, compact=compact)
    elif any(is_sharded(t) for _, _, _, t in owned_tensors(home, record_of(home, name))):
        ll.adapter_state_dict(home, name)


def _exported(home: nn.Module, folder: Path, name: str) -> bool:
    """Write PEFT's two files, where its layout can hold the adapter."""
    try:
        ll.export(home, folder, name)
    except StateError:  # no pair of low-rank factors; the card says so
        return False
    return True


def write_folder(
    model: nn.Module, folder: str | os.PathLike[str], trainer: Any = None, compact: bool = True, **facts: Any
) -> None:
    """`write_adapters`, and beside them what a reader of the folder needs.

    Args:
        trainer: whose tokenizer, arguments and figures go along; None where there is none.
        facts: more for the card, see `card`.
    """
    folder = Path(folder)
    writer = trainer is None or trainer.args.should_save
    exported = write_adapters(model, folder, compact, writer)
    if not writer:
        return
    if trainer is not None:
        processing: Any = getattr(trainer, "processing_class", None)
        if hasattr(processing, "save_pretrained"):
            processing.save_pretrained(folder)
        torch.save(trainer.args, folder / "training_args.bin")
        facts = {"history": trainer.state.log_history, "steps": trainer.state.global_step} | facts
    (folder / CARD).write_text(card(model, exported, **facts), encoding="utf-8")


def copy_adapters(source: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Copy our files and the card of a checkpoint."""
    for path in (*Path(source).glob("adapter*.safetensors"), Path(source) / CARD):
        if path.is_file():
            shutil.copy(path, folder)


def load_checkpoint(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Copy the adapters of a checkpoint folder into the attached, trainable adapters, in place, and set their schedules
    to its step.

    Raises:
        FileError: an adapter is missing, has another config or other targets, or was trained on another base; nothing
            is copied then.
    """
    found = []
    for home, handle in trainable(model):
        path = Path(folder) / adapter_file(handle.name)
        if not path.is_file():
            raise FileError(f"{folder} is no checkpoint of adapter {handle.name!r}: it holds no {path.name}.")
        head, tensors = native.read(path)
        theirs, ours = config_from_header(head, str(path)).to_dict(), handle.cfg.to_dict()
        other = [f"{k}={theirs.get(k)!r}, not {v!r}" for k, v in ours.items() if theirs.get(k) != v]
        if other:
            raise FileError(
                f"{path} was trained with another config ({'; '.join(other)}); attach with the same one to resume."
            )
        native.check_base(home, handle.record, head, "error", str(path))
        native.check_keys(native.expected(handle.record), tensors, str(path))
        check_sums(head, handle.record, tensors, str(path))
        found.append((home, handle, tensors))
    for home, handle, tensors in found:
        ll.load_adapter_state_dict(home, handle.name, tensors)
    load_steps(model, folder)


def load_steps(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Set the schedules of the trainable adapters to the step of a checkpoint folder."""
    for _, handle in trainable(model):
        head, _ = native.read(Path(folder) / adapter_file(handle.name))
        handle.record.steps = int(head.get("steps") or 0)
