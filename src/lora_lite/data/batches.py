"""Rows of tokens as padded tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .tokens import IGNORED, Tokens


def collate(rows: Sequence[Tokens], pad: int) -> dict[str, Any]:
    """Right-padded `input_ids`, `attention_mask` and `labels` as tensors; packed rows have `position_ids`, not the
    mask."""
    import torch

    width = max(len(r["input_ids"]) for r in rows)

    def padded(key: str, value: int) -> Any:
        return torch.tensor([r[key] + [value] * (width - len(r[key])) for r in rows])

    if "position_ids" in rows[0]:  # a mask would hide where one row ends; what fills up is a row of its own
        positions = [r["position_ids"] + list(range(width - len(r["input_ids"]))) for r in rows]
        ids, labels = padded("input_ids", pad), padded("labels", IGNORED)
        return {"input_ids": ids, "position_ids": torch.tensor(positions), "labels": labels}
    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
    return {"input_ids": padded("input_ids", pad), "attention_mask": mask, "labels": padded("labels", IGNORED)}


def batches(rows: Sequence[Tokens], size: int, pad: int) -> Iterator[dict[str, Any]]:
    """Collated batches in order, for evaluation and calibration."""
    for start in range(0, len(rows), size):
        yield collate(rows[start : start + size], pad)
