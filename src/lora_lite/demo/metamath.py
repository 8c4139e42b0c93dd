"""MetaMathQA to GSM8K as a task of the leaderboard, with the settings of PEFT's method comparison: any causal model of
the hub or of a folder, and the data sets of the hub or local files of the same columns. Meant for a GPU."""

from __future__ import annotations

import random
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from ..core.errors import FileError
from ..data.batches import collate
from ..data.tokens import tokenised
from .data import load_model
from .evaluate import complete, mean_loss

BASE, TRAIN, TEST = "meta-llama/Llama-3.2-3B", "meta-math/MetaMathQA", "openai/gsm8k"
TEMPLATE = "Question: {} Think step by step.\nAnswer:"
WIDTH = 768
"""Longest row, question and answer, in tokens."""
CHARACTERS = 1300
"""Longer rows are left out, as PEFT's comparison does."""
VALIDATION = 50


class MetaMath:
    """Exact match on the last number of GSM8K's test answers after training on MetaMathQA."""

    name = "metamath"
    fields: dict[str, Any] = {}
    head_lr: float | None = None

    def __init__(
        self,
        base: str | None = None,
        train: str | None = None,
        test: str | None = None,
        dtype: str = "bfloat16",
        batch_size: int = 4,
        new_tokens: int = 300,
    ) -> None:
        self.base, self.dtype, self.batch_size, self.new_tokens = base or BASE, dtype, batch_size, new_tokens
        self.tokenizer = load_model(self.base, dtype)[1]
        self.sources = train or TRAIN, test or TEST

    def load(self) -> nn.Module:
        return load_model(self.base, self.dtype)[0]

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        """MetaMathQA's rows, the validation questions left out."""
        found = [(r["query"], r["response"]) for r in table(self.sources[0], "train", ("query", "response"))]
        kept = [(q, a) for q, a in found if len(q) + len(a) <= CHARACTERS]
        random.Random("metamath").shuffle(kept)
        return [{"prompt": TEMPLATE.format(q), "completion": f" {a}"} for q, a in kept]

    @cached_property
    def questions(self) -> dict[str, list[tuple[str, str]]]:
        """(prompt, right number) of both splits."""
        rows = table(self.sources[1], "test", ("question", "answer"))
        tested = [(TEMPLATE.format(r["question"]), last_number(r["answer"].rpartition("####")[2]) or "") for r in rows]
        held = [(row["prompt"], last_number(row["completion"]) or "") for row in self.rows[:VALIDATION]]
        return {"validation": held, "test": tested}

    def batch(self, step: int) -> dict[str, Tensor]:
        rows = self.rows[VALIDATION:]
        chosen = random.Random(f"metamath-{step}").sample(rows, min(self.batch_size, len(rows)))
        encoded = tokenised(chosen, self.tokenizer, WIDTH).rows
        return collate(encoded, self.tokenizer.pad_token_id)

    def examine(self, model: nn.Module, split: Literal["validation", "test"]) -> tuple[float, float, int]:
        asked = self.questions[split]
        said = complete(model, self.tokenizer, [prompt for prompt, _ in asked], 16, self.new_tokens)
        right = sum(last_number(text) == number for text, (_, number) in zip(said, asked, strict=True))
        held = tokenised(self.rows[:VALIDATION], self.tokenizer, WIDTH).rows
        return right / len(asked), mean_loss(model, held, 4, self.tokenizer.pad_token_id), len(asked)

    def remembered(self, model: nn.Module) -> float | None:
        from pydoc_data import topics

        ids = self.tokenizer("\n\n".join(topics.topics[k] for k in sorted(topics.topics)))["input_ids"]
        rows = [ids[i * WIDTH : (i + 1) * WIDTH] for i in range(8)]
        rows = [{"input_ids": r, "labels": r} for r in rows if r]
        return mean_loss(model, rows, 4, self.tokenizer.pad_token_id)


def table(source: str, split: str, columns: tuple[str, str]) -> list[dict[str, str]]:
    """The rows of a local JSON, JSONL or Parquet file, or of a data set of the hub.

    Raises:
        FileError: it cannot be read, or lacks a column.
    """
    from pathlib import Path

    import datasets

    kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(Path(source).suffix)
    try:
        if kind:
            data = datasets.load_dataset(kind, data_files=source, split="train")
        else:
            data = datasets.load_dataset(source, "main" if source == TEST else None, split=split)
    except (OSError, ValueError, RuntimeError) as e:
        raise FileError(f"no data set can be loaded from {source!r}: {str(e).splitlines()[0]}") from None
    missing = [c for c in columns if c not in data.column_names]
    if missing:
        raise FileError(f"{source} has the columns {data.column_names}, and no {' and no '.join(missing)}.")
    rows: list[Any] = list(data)
    return rows


def last_number(text: str) -> str | None:
    """The last number in a text, without thousands separators; "12.0" is "12"."""
    import re

    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not found:
        return None
    number = found[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number
