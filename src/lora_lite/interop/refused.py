"""What a trainer does or is told to do that an adapter cannot follow: refused before the first step."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.errors import StateError
from .homes import trainable
from .reference import parameters


def check_trainer(trainer: type) -> None:
    """Raise for a trainer that sends weights to a server on a way of its own.

    Raises:
        StateError: it picks the trainable parameters by their names, of which a server knows none.
    """
    if "weight_transfer" in parameters(trainer):
        raise StateError(
            f"{trainer.__name__} sends its server the trainable parameters under their names, and an adapter's are "
            "none of the base's. GRPOTrainer and RLOOTrainer with use_vllm=True are sent merged weights: "
            "ll.trainer(GRPOTrainer, cfg)."
        )


def check_packing(args: Any, model: nn.Module) -> None:
    """Raise where rows are packed and an adapter acts on some positions only: not every TRL marks where one text ends
    and the next begins, and a prompt in the middle of a row would be taken for an answer.

    Raises:
        StateError: both are the case.
    """
    packed = next((field for field in ("packing", "padding_free") if getattr(args, field, False)), None)
    if packed is None:
        return
    for _, handle in trainable(model):
        positions = getattr(handle.cfg, "positions", "all")
        if positions != "all":
            raise StateError(
                f"adapter {handle.name!r} acts on positions={positions!r}, and {packed}=True puts several texts into "
                f"one row, where they cannot be told apart. Set {packed}=False, or attach it with positions='all'."
            )
