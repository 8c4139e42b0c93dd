"""`ll.callbacks.SaveAdapter()`: the adapter's own folder beside what a plain Trainer saves."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from .folder import write_adapters, write_folder

FOLDER = "adapter"
"""The folder's name, in each checkpoint and at the end in the output folder."""


@cache
def _save_adapter() -> type:
    from transformers import TrainerCallback

    class SaveAdapter(TrainerCallback):
        """For a plain Trainer, which saves the whole model: writes the adapter alone into a folder `adapter` of every
        checkpoint, and of the output folder at the end, where `ll.load` and PEFT find it.

            Trainer(model=model, args=args, train_dataset=data, callbacks=[ll.callbacks.SaveAdapter()])
        """

        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            """Into the checkpoint that was written."""
            _write(Path(args.output_dir) / f"checkpoint-{state.global_step}", args, state, model, compact=False)

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            """Into the output folder."""
            _write(Path(args.output_dir), args, state, model, compact=True)

    return SaveAdapter


def _write(folder: Path, args: Any, state: Any, model: Any, compact: bool) -> None:
    if args.should_save:
        write_folder(model, folder / FOLDER, None, compact, history=state.log_history, steps=state.global_step)
    else:
        write_adapters(model, folder / FOLDER, writer=False)


def __getattr__(name: str) -> Any:
    if name == "SaveAdapter":
        return _save_adapter()
    raise AttributeError(f"lora_lite.callbacks has no {name!r}; it has 'SaveAdapter'.")


def __dir__() -> list[str]:
    return ["SaveAdapter"]
