"""What train and demo share: the adapter with the calibration data that its method asks for."""

from __future__ import annotations

from typing import Any

import lora_lite as ll

from ..data.batches import batches
from ..data.tokens import IGNORED


def calibration(
    variant: type[ll.Variant], wanted: int | None, rows: list[dict[str, list[int]]], size: int, tokenizer: Any
) -> list[Any] | None:
    """The batches a method with a start from data gets: the first of the training rows; None for the other methods."""
    if variant.group_init is None:
        if wanted is not None:
            raise ll.ConfigError(
                f"--calibration-batches: method {variant.name!r} uses no calibration data; leave the flag out."
            )
        return None
    n = 8 if wanted is None else wanted
    if n < 1:
        raise ll.ConfigError(f"--calibration-batches must be positive, got {n}.")
    return list(batches(rows[: n * size], size, pad_of(tokenizer)))


def pad_of(tokenizer: Any) -> int:
    """The token that fills short rows."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def attach(
    model: Any,
    cfg: ll.AdapterConfig,
    wanted: int | None,
    rows: list[dict[str, list[int]]],
    size: int,
    tokenizer: Any,
    pairs: bool = False,
    reference: str | None = None,
) -> ll.Adapter:
    """`ll.attach` with the calibration data that the method asks for; contrast pairs are made of the rows only if
    `pairs`."""
    variant = ll.get_variant(cfg.variant)
    if variant.needs_data != "pairs":
        data = calibration(variant, wanted, rows, size, tokenizer)
        return ll.attach(model, cfg, calibration_data=data, reference_weights=reference)
    if not pairs:
        raise ll.ConfigError(
            f"method {variant.name!r} is fitted from contrast pairs, which a file of examples does not hold. "
            "In Python: ll.attach(model, cfg, calibration_data=[(positive batch, negative batch), ...])."
        )
    right, wrong = rows[: 4 * size], [swapped(a, b) for a, b in zip(rows[: 4 * size], rows[1:], strict=False)]
    pad = pad_of(tokenizer)
    both = zip(batches(right[: len(wrong)], size, pad), batches(wrong, size, pad), strict=True)
    return ll.attach(model, cfg, calibration_data=list(both))


def swapped(row: dict[str, list[int]], other: dict[str, list[int]]) -> dict[str, list[int]]:
    """The prompt of one row with the completion of another: the negative half of a contrast pair."""
    prompt = [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORED]
    completion = [label for label in other["labels"] if label != IGNORED]
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}
