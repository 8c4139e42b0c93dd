"""DeepSpeed's checkpoints of an adapted model hold what trains, and nothing of the base."""

from __future__ import annotations

import functools
from typing import Any


def leave_base_out(accelerator: Any) -> None:
    """Make the engines that `accelerator.prepare` returns save the trained parameters alone, and load as many."""
    prepare = accelerator.prepare

    @functools.wraps(prepare)
    def prepared(*args: Any, **kwargs: Any) -> Any:
        found = prepare(*args, **kwargs)
        for one in found if isinstance(found, tuple) else (found,):
            if hasattr(one, "save_checkpoint") and hasattr(one, "load_checkpoint"):
                one.save_checkpoint = _with(one.save_checkpoint, exclude_frozen_parameters=True)
                one.load_checkpoint = _with(one.load_checkpoint, load_module_strict=False)
        return found

    accelerator.prepare = prepared


def _with(function: Any, **said: Any) -> Any:
    """A function that is always called with these arguments, and shows its own signature."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **(kwargs | said))

    return called
