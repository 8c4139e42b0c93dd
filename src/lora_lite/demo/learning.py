"""`wordmath` as a task of the leaderboard: the bundled base, and word problems in an order that no method changes."""

from __future__ import annotations

import random
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from ..data.batches import collate
from ..data.tokens import Tokens, tokenised
from .data import load_model, wordmath_rows
from .evaluate import evaluate, mean_loss
from .wordmath import generate

TRAIN_ROWS = 12_000
WIDTH = 256
"""Longest row in tokens."""
EVERY = 9
"""Of so many chapters of Python's own documentation, which the base was trained on, one is read again."""


class WordMath:
    """Exact match on the final number of word problems whose sentences, names and numbers training has not."""

    name = "wordmath"
    fields: dict[str, Any] = {}
    head_lr: float | None = None

    def __init__(self, batch_size: int = 8, questions: int = 300) -> None:
        self.batch_size, self.questions = batch_size, questions
        self.tokenizer = load_model()[1]

    def load(self) -> nn.Module:
        return load_model()[0]

    @cached_property
    def rows(self) -> list[Tokens]:
        return tokenised(wordmath_rows("train", TRAIN_ROWS), self.tokenizer, WIDTH).rows

    def batch(self, step: int) -> dict[str, Tensor]:
        """Rows of like length, drawn by the step alone."""
        rng, size = random.Random(f"wordmath-{step}"), self.batch_size
        pool = sorted(rng.sample(self.rows, size * 4), key=lambda r: len(r["input_ids"]))
        k = rng.randrange(4)
        return collate(pool[k * size : (k + 1) * size], self.tokenizer.pad_token_id)

    def examine(self, model: nn.Module, split: Literal["validation", "test"]) -> tuple[float, float, int]:
        problems = generate(split, self.questions)
        answers = evaluate(model, self.tokenizer, problems, batch_size=100)
        rows = tokenised(wordmath_rows(split, self.questions), self.tokenizer, WIDTH).rows
        return answers.accuracy, mean_loss(model, rows, 100, self.tokenizer.pad_token_id), len(problems)

    def remembered(self, model: nn.Module) -> float | None:
        from pydoc_data import topics

        rows = []
        for name in sorted(topics.topics)[::EVERY]:
            ids = self.tokenizer(topics.topics[name])["input_ids"][:WIDTH]
            rows.append({"input_ids": ids, "labels": ids})
        return mean_loss(model, rows, len(rows), self.tokenizer.pad_token_id)
